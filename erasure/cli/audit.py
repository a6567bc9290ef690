"""`erasure audit`: evaluations, attacks and stress tests of an erasure in one run, and a page that says what held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from erasure.cli.recording import record
from erasure.cli.terminal import Terminal

if TYPE_CHECKING:
    from erasure.eval.audits.runner import Audit

NONE = "none"
"""Says that no attack, or no stress test, is wanted."""


@dataclass(kw_only=True)
class AuditOptions(DrawnSuiteOptions, RecordedOptions):
    """Evaluate, attack and stress an erasure, and grade it for each kind of attacker.

    Run the same command again to resume an interrupted run. Parts that cannot be run on this model or erasure are
    reported as refused, with the reason.
    """

    concept: tuple[str, ...] = ()
    """Concepts that count as erased; those of the erasures when left out."""
    suites: tuple[str, ...] = ("canvas", "canvas-unseen")
    """Evaluations to run, see `erasure eval`. For a model of your own: `prompts`, with `--clip` or `--detector`;
    attacks and stress tests then take their prompts and judge from it, too."""
    prompts: str | None = None
    """Prompt list of the suites on prompts: a .csv, .tsv or .jsonl file in UTF-8, a folder of the library datasets, or
    `hf:NAME` of its Hub."""
    detector: tuple[str, ...] = ()
    """Detectors of the suites on prompts, see `erasure eval`."""
    clip: str | None = None
    """CLIP model for CLIP scores, and that suites on prompts ask what images show: its folder, or its repository of
    the Hugging Face Hub. The embedded one when left out, for scores alone."""
    attacks: tuple[str, ...] = ()
    """Attacks to run, see `erasure attack`: all when left out, `none` for none."""
    stress: tuple[str, ...] = ()
    """Stress tests to run, see `erasure stress`: all when left out, `none` for none."""
    size: Literal["smoke", "quick", "full"] = "quick"
    """Size of every part: `smoke` only shows that it runs, `quick` takes hours on a laptop with a small model, `full`
    gives numbers to publish."""
    out: Path
    """Folder to write report.html, README.md, audit.json and a folder for each part into."""


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Carry out the command.

    Returns:
        The exit code: 1 where a part failed.
    """
    options = parse(AuditOptions, "audit", argv)
    terminal.json_only = options.json
    check_strengths(options)
    if not options.erasure:
        raise UsageError("nothing to audit: give --erasure")
    attacks, stress = _chosen(options.attacks), _chosen(options.stress)
    from erasure.eval.audits.parts import parts_of
    from erasure.eval.audits.runner import audit
    from erasure.eval.judges import load_judge

    parts_of(options.concept, options.suites, attacks, stress)  # unknown names are refused before anything is opened
    inputs = options.inputs(options.prompts, options.detector)
    erasures = load_erasures(options)
    concepts = make_concepts(options.concept, canvas_facts(options.model), options.kind) if options.concept else None
    judge = None if options.judge is None else load_judge(options.judge)
    out = check_output_folder(options.out, may_hold=True)
    pipe = open_model(options)
    for suite in options.suites:
        options.use_sampler(pipe, suite)
    attach(pipe, erasures, options.strength)
    found = audit(
        pipe, concepts, out=out, suites=options.suites, attacks=attacks, stress=stress, size=options.size,
        seed=options.seed, judge=judge, clip=options.clip, inputs=inputs, progress=terminal.speaks,
    )  # fmt: skip
    if not is_main_process():
        return 0
    remarks: dict[str, None] = {}
    if not options.no_record:
        own = {concept.target for made in erasures.values() for concept in made.concepts}
        for outcome in found.outcomes:
            about = {outcome.part.concept} if outcome.part.concept else set(found.concepts)
            if outcome.results is not None:
                remarks |= dict.fromkeys(record(options, erasures, outcome.results, about == own))
    if options.json:
        terminal.result(found.to_dict())
    else:
        say_outcomes(found, terminal)
        terminal.say(*remarks, f"What held, and what did not: {out / 'report.html'}")
    if found.failures:
        names = ", ".join(outcome.part.folder for outcome in found.failures)
        terminal.complain("error", f"{len(found.failures)} parts failed ({names}); {out / 'report.html'} says why")
    return int(bool(found.failures))


def _chosen(names: tuple[str, ...]) -> tuple[str, ...] | None:
    if NONE in names and len(names) > 1:
        raise UsageError(f"{NONE!r} leaves out everything: do not name {', '.join(set(names) - {NONE})} beside it")
    return () if names == (NONE,) else names or None


def say_outcomes(found: Audit, terminal: Terminal) -> None:
    """Print a line for every part, what it has cost, and the word for every attacker."""
    from erasure.eval.audits.page import costs, section
    from erasure.eval.audits.parts import GRADES

    sections = [section(found, grade) for grade in GRADES]
    rows = [
        [each.title, line.name, line.concept, line.rate or line.detail, line.chance, line.word]
        for each in sections for line in each.lines
    ]  # fmt: skip
    terminal.table(("attacker has", "tried", "concept", "shows it", "by chance", "verdict"), rows)
    terminal.table(
        ("part", "time", "images drawn", "found in the cache"), [list(each) for each in costs(found.outcomes)]
    )
    terminal.table(("attacker has", "verdict"), [[each.title, each.word] for each in sections])
