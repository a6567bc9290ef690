"""`erasure eval SUITE`: measure a model and its erasures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from erasure.cli.arguments import UsageError, parse
from erasure.cli.models import (
    DrawnSuiteOptions,
    RecordedOptions,
    attach,
    canvas_facts,
    check_strengths,
    load_erasures,
    make_concepts,
    open_model,
)
from erasure.cli.output import check_output_folder
from erasure.cli.processes import is_main_process
from erasure.cli.recording import left_out, record
from erasure.cli.terminal import Terminal, format_metric
from erasure.shown import number

if TYPE_CHECKING:
    from erasure.eval.rows import Row
    from erasure.interop.protocols import Settings


@dataclass(kw_only=True)
class EvalOptions(DrawnSuiteOptions, RecordedOptions):
    """Measure a model without and with its erasures. Run the same command again to resume an interrupted run."""

    suite: tyro.conf.Positional[str]
    """Suite to measure with, for instance `canvas`."""
    concept: tuple[str, ...] = ()
    """Concepts that count as erased; those of the erasures when left out."""
    size: Literal["smoke", "quick", "full"] = "quick"
    """How many images are drawn: `smoke` only shows that it runs, `quick` takes minutes on a laptop, `full` gives
    numbers to publish."""
    clip: str | None = None
    """CLIP model for CLIP scores and feature distances, of open_clip or transformers: its folder, or its repository of
    the Hugging Face Hub; `none` for none. The embedded one when left out."""
    prompts: str | None = None
    """Prompt list of a suite on prompts: a .csv, .tsv or .jsonl file in UTF-8, a folder of the library datasets, or
    `hf:NAME` of its Hub."""
    detector: tuple[str, ...] = ()
    """Detectors that look at the images, in the place of the suite's own or besides its judge: `nudenet:preset=mace`,
    `clip_zero_shot:model=FOLDER,flags=a zebra,others=a horse|a field`, `LABEL=NAME:option=value`."""
    controls: Path | None = None
    """Folder with pictures in `positive/` that show what the detectors look for, and in `negative/` that do not:
    sensitivity and specificity are measured on them."""
    reveal: bool = False
    """Write revealed.html besides: the pictures that may be unsafe, which report.html hides. The same command again
    with this writes it without drawing anything."""
    out: Path
    """Folder of results.json, samples.jsonl and report.html."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    from erasure.eval.suites import SUITES

    if argv and not argv[0].startswith("-"):
        SUITES.check(argv[0])
    options = parse(EvalOptions, "eval", argv)
    terminal.json_only = options.json
    check_strengths(options)
    from erasure.eval import evaluate
    from erasure.eval.judges import load_judge
    from erasure.eval.metrics.clip_score import ClipModel
    from erasure.eval.suites.prompts import PromptSuite

    suite = SUITES.get(options.suite)
    erasures = load_erasures(options)
    if options.concept:
        # Where the kind of a concept says how it is drawn.
        tell = options.prompts is None and isinstance(suite, PromptSuite) and bool(suite.about.style_templates)
        concepts = make_concepts(options.concept, canvas_facts(options.model), options.kind, tell=tell)
    else:
        concepts = list({concept.target: concept for made in erasures.values() for concept in made.concepts}.values())
    inputs = options.inputs(options.prompts, options.detector)
    if not concepts and suite.of_concepts:
        raise UsageError("nothing to measure: give --erasure, or --concept for the unchanged model")
    # Refused before anything is made or opened.
    judge = None if options.judge is None else load_judge(options.judge)
    if options.clip not in (None, "none"):
        ClipModel(options.clip)
    out = check_output_folder(options.out, may_hold=True)
    pipe = open_model(options)
    options.use_sampler(pipe, options.suite)
    attach(pipe, erasures, options.strength)
    found = evaluate(
        pipe, options.suite, concepts, size=options.size, seed=options.seed, out=out, judge=judge, clip=options.clip,
        progress=terminal.speaks, controls=options.controls, reveal=options.reveal, **inputs,
    )  # fmt: skip
    if not is_main_process():
        return
    if not options.no_record:
        own = {concept.target for made in erasures.values() for concept in made.concepts}
        terminal.say(*record(options, erasures, found, own == {concept.target for concept in concepts}))
    results = found.to_dict()
    if options.json:
        terminal.result(results)
        return
    columns, rows = metric_table(results["metrics"])
    terminal.table(columns, rows)
    terminal.say(
        *remarks(results["metrics"]),
        *detector_remarks(found.detectors),
        *left_out(found.model),
        *cost_remarks(found.cost),
    )
    terminal.say(f"Images and intervals: {out / 'report.html'}")
    if options.reveal:
        revealed = out / "revealed.html"
        is_there = revealed.is_file()
        terminal.say(f"Pictures that may be unsafe: {revealed}" if is_there else "No picture is hidden in the report.")


def cost_remarks(cost: Settings) -> list[str]:
    """Say in a line what a run spent its time on."""
    from erasure.eval.cost import SHARES

    shares = [
        f"{number(cost[key], '.0f', 100)} % in {what}" for key, what in SHARES.items() if cost.get(key) is not None
    ]
    return [f"Took {number(cost['seconds'], '.1f')} s, of which {', '.join(shares)}."] if shares else []


def detector_remarks(detectors: Sequence[Row]) -> list[str]:
    """Say what the findings of each detector are worth, in a line."""
    lines = []
    for entry in detectors:
        label, measured = entry["label"], entry.get("controls")
        if measured is None:
            lines.append(f"Sensitivity of {label} was not measured: --controls DIR, with positive/ and negative/.")
            continue
        shares = [f"{name} {format_metric(measured[name])}" for name in ("sensitivity", "specificity")]
        lines.append(f"The detector {label} on your controls: {', '.join(shares)}.")
    return lines


def metric_table(metrics: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Metric rows as the columns and rows of a table: one line a metric and concept, one column a variant.

    Controls, and what was seen in the place of a concept, are said below the table (`remarks`).
    """
    from erasure.eval.rows import is_figure

    variants: dict[str, None] = {}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in filter(is_figure, metrics):
        variant = row.get("variant") or "after"
        variants.setdefault(variant)
        lines.setdefault((row["name"], row.get("concept") or ""), {})[variant] = format_metric(row)
    rows = [[*line, *(cells.get(variant, "-") for variant in variants)] for line, cells in lines.items()]
    return ["metric", "concept", *variants], rows


def remarks(metrics: Sequence[Row]) -> list[str]:
    """What a reader of the table must know besides: what took a concept's place, and why a number is not there."""
    lines = []
    for row in metrics:
        if row.get("variant") == "after" and row.get("classes"):
            seen = ", ".join(f"{name} {number(share, '.0f', 100)} %" for name, share in row["classes"].items())
            lines.append(f"Where {row['concept']} is asked for, the judge sees: {seen}.")
    return [*lines, *refusals(metrics)]


def refusals(metrics: Sequence[Row]) -> list[str]:
    """Why numbers are not given, each reason once."""
    from erasure.eval.rows import is_figure

    reasons: dict[str, list[str]] = {}
    for row in filter(is_figure, metrics):
        if "value" in row and row["value"] is None and row.get("reason"):
            reasons.setdefault(str(row["reason"]), []).append(f"{row['name']} {row.get('variant', 'after')}")
    return [f"No number ({', '.join(dict.fromkeys(names))}): {reason}." for reason, names in reasons.items()]
