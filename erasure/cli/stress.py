"""`erasure stress TEST`: change the erased model, and see in which changes the concept comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erasure.cli.arguments import UsageError
from erasure.cli.described import changes, list_of, options_of, parse_with
from erasure.cli.eval import cost_remarks, metric_table, refusals
from erasure.cli.models import MeasuringOptions, SuiteOptions, attach, check_strengths, load_erasures, open_model
from erasure.cli.output import check_output_folder
from erasure.cli.processes import is_main_process
from erasure.cli.recording import left_out
from erasure.cli.terminal import Terminal
from erasure.concept import Concept
from erasure.eval.stress import STRESS_TESTS
from erasure.shown import number
from erasure.world import World

if TYPE_CHECKING:
    from erasure.eval import Results
    from erasure.eval.rows import Row
    from erasure.interop.protocols import Settings

HELP = """usage: erasure stress TEST --model M --erasure E [--erasure E ...] --out DIR [options]

Changes the erased model in several ways, and measures which of them bring the concept back. Every change has a
control.

stress tests:
{tests}

The options of each: erasure stress TEST --help"""


@dataclass(kw_only=True)
class StressOptions(SuiteOptions, MeasuringOptions):
    """What to put under stress, and where to write the result."""

    concept: str | None = None
    """Concept that must not come back; that of the erasures when left out."""
    size: Literal["smoke", "quick", "full"] = "quick"
    """How much is drawn: `smoke` only shows that it runs, `quick` takes minutes with a small model, `full` gives
    numbers to publish. It sets the test's options; options that are given change single values."""
    suite: str = "canvas"
    """Suite that gives the prompts and the judge. `prompts` takes any model and any concept, with `--clip` or
    `--detector`."""
    prompts: str | None = None
    """Prompt list of a suite on prompts: a .csv, .tsv or .jsonl file in UTF-8, a folder of the library datasets, or
    `hf:NAME` of its Hub."""
    detector: tuple[str, ...] = ()
    """Detector to use instead of the judge (see `erasure detect`): a picture that it flags shows the concept. It
    cannot say what else a picture shows, so no prompts of other concepts are drawn, but by suites on prompts."""
    clip: str | None = None
    """CLIP model for tests that compare image features, and that a suite on prompts asks what images show: its folder
    or repository; the embedded one when left out."""
    out: Path
    """Folder of results.json, samples.jsonl, report.html and images. Run the same command again to resume an
    interrupted run."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    if not argv or argv[0] in ("-h", "--help"):
        terminal.whole(f"{HELP.format(tests=list_of(STRESS_TESTS))}\n")
        return
    name, *rest = argv
    if name.startswith("-"):
        names = ",".join(STRESS_TESTS.names())
        raise UsageError(f"name the stress test first: erasure stress {{{names}}} --model M --erasure E --out O")
    attributes, test = STRESS_TESTS.facts(name).attributes, options_of(STRESS_TESTS, name)
    # Twice: which options the test starts from is known only when the size is.
    about = f"{attributes['title']} ({attributes['paper']}). Control: {attributes['control']}."
    size = parse_with(StressOptions, test(), f"stress {name}", rest, about).command.size
    start = test(**attributes["sizes"].get(size, {}))
    parsed = parse_with(StressOptions, start, f"stress {name}", rest, about)
    options: StressOptions = parsed.command
    terminal.json_only = options.json
    check_strengths(options)
    if not options.erasure:
        raise UsageError("nothing to put under stress: give --erasure")
    if options.judge is not None and options.detector:
        raise UsageError("--judge and --detector are two ways to say who looks at the images: give one of them")
    found = _stressed(options, name, changes(parsed.options, start), terminal)
    if not is_main_process():
        return
    results = found.to_dict()
    if options.json:
        terminal.result(results)
        return
    columns, rows = by_condition(results["metrics"])
    terminal.table(columns, rows)
    columns, rows = metric_table([row for row in results["metrics"] if row["name"] not in BY_CONDITION])
    if rows:
        terminal.table(columns, rows)
    terminal.say(*left_out(results["model"]), *refusals(results["metrics"]), *failed_controls(results["metrics"]))
    terminal.say(*cost_remarks(results["cost"]))
    terminal.say(f"The page with pictures: {options.out / 'report.html'}")


def _stressed(options: StressOptions, name: str, changed: Settings, terminal: Terminal) -> Results:
    """Open everything, cheap checks first, and do it."""
    from erasure.eval import suites
    from erasure.eval.detectors.choices import made, read_choices
    from erasure.eval.judges import load_judge
    from erasure.eval.stress.runner import stress_test
    from erasure.eval.suites.prompts import PromptSuite

    suites.get(options.suite)
    STRESS_TESTS.get(name).configured(options.size, **changed)
    judge = None if options.judge is None else load_judge(options.judge)
    inputs, detector = options.inputs(options.prompts, options.detector), None
    if options.detector and not isinstance(suites.get(options.suite), PromptSuite):
        if len(options.detector) > 1:
            raise UsageError(f"suite {options.suite} takes one detector in its judge's place: give one --detector")
        del inputs["detectors"]
        (detector,) = made(read_choices(options.detector)).values()
    erasures = load_erasures(options)
    concept: Concept | None = None
    if options.concept is not None:
        concept = World.at(options.model).concept(options.concept, options.kind)
    out = check_output_folder(options.out, may_hold=True)
    pipe = open_model(options)
    options.use_sampler(pipe, options.suite)
    attach(pipe, erasures, options.strength)
    return stress_test(
        pipe, name, concept, size=options.size, suite=options.suite, inputs=inputs, seed=options.seed, out=out,
        judge=judge if detector is None else detector, clip=options.clip, progress=terminal.speaks, **changed,
    )  # fmt: skip


BY_CONDITION = ("concept_shown", "retained_seen", "recovered")
"""Metrics that every condition has, one column each."""


def by_condition(metrics: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A table with a line for each condition: rates, what came back, and the verdict."""
    from erasure.cli.terminal import format_metric

    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in metrics:
        if row["name"] in BY_CONDITION:
            label = str(row["concept"] or "") if row["name"] != "retained_seen" else ""
            key = next((k for k in lines if k[0] == row["variant"]), (str(row["variant"]), label))
            cells = lines.setdefault(key, {})
            cells[row["name"]] = format_metric(row)
            if row["name"] == "recovered":
                cells["verdict"] = str(row.get("verdict") or "no verdict")
    columns = [name for name in (*BY_CONDITION, "verdict") if any(name in cells for cells in lines.values())]
    rows = [[*key, *(cells.get(name, "-") for name in columns)] for key, cells in lines.items()]
    return ["condition", "of", *columns], rows


def failed_controls(metrics: Sequence[Row]) -> list[str]:
    """A line for each control that does not hold."""
    lines = []
    for row in metrics:
        if row.get("holds") is False:
            share = "no image could be judged" if row["value"] is None else f"{number(row['value'], '.0f', 100)} %"
            lines.append(f"Control {row['name']} of {row['variant']} fails: {row['recipe']['metric']}: {share}.")
    return lines
