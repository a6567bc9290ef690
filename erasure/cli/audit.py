"""`erasure audit`: evaluations, attacks and stress tests of an erasure in one run, and a page that says what held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erasure.cli.models import (
    ErasedModelOptions,
    attach,
    canvas_facts,
    check_strengths,
    load_erasures,
    make_concepts,
    open_model,
)
from erasure.cli.recording import record
from erasure.cli.terminal import Terminal, UsageError, is_main_process, output_folder, parse
from erasure.concept import Kind

if TYPE_CHECKING:
    from erasure.eval.audits.runner import Audit

NONE = "none"
"""Says that no attack, or no stress test, is wanted."""


@dataclass(kw_only=True)
class AuditOptions(ErasedModelOptions):
    """Evaluate, attack and stress an erasure, and say against which attackers it held.

    The same command again goes on where a killed one stopped. What this model or this erasure does not allow is
    written down as refused, with the reason.
    """

    concept: tuple[str, ...] = ()
    """Concepts that count as erased; those of the erasures when left out."""
    kind: Kind | None = None
    """What the concepts given are. Left out, a Canvas model says it, and other models take them for objects."""
    suites: tuple[str, ...] = ("canvas", "canvas-unseen")
    """Evaluations (`erasure eval`)."""
    attacks: tuple[str, ...] = ()
    """Attacks (`erasure attack`); all when left out, and `none` for none."""
    stress: tuple[str, ...] = ()
    """Stress tests (`erasure stress`); all when left out, and `none` for none."""
    size: Literal["smoke", "quick", "full"] = "quick"
    """Of every part. `smoke`: does it run; `quick`: hours on a laptop with a small model; `full`: the numbers to
    publish."""
    seed: int = 0
    """Seed of the samples' noise, and through it of everything random."""
    judge: str | None = None
    """Detector in the place of the suites' own: the folder of a judge, or `module:attribute` of a function or class of
    your own that takes a list of images and gives answers with `.object` and `.style`."""
    no_record: bool = False
    """Do not write summaries of the results into the erasure's config and card, where `erasure info` finds them."""
    out: Path
    """Folder of report.html, README.md and audit.json, and of a folder for each part."""
    json: bool = False
    """Print audit.json, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(AuditOptions, "audit", argv)
    terminal.json_only = options.json
    check_strengths(options)
    if not options.erasure:
        raise UsageError("nothing to audit: give --erasure")
    from erasure.eval.audits.runner import audit
    from erasure.eval.judges import load_judge

    erasures = load_erasures(options)
    concepts = make_concepts(options.concept, canvas_facts(options.model), options.kind) if options.concept else None
    judge = None if options.judge is None else load_judge(options.judge)
    out = output_folder(options.out, may_hold=True)
    pipe = open_model(options)
    attach(pipe, erasures, options.strength)
    found = audit(
        pipe, concepts, out=out, suites=options.suites, attacks=_chosen(options.attacks),
        stress=_chosen(options.stress), size=options.size, seed=options.seed, judge=judge, progress=terminal.speaks,
    )  # fmt: skip
    if not is_main_process():
        return
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
        _say(found, terminal)
        terminal.say(*remarks, f"What held, and what did not: {out / 'report.html'}")
    if found.failures:
        names = ", ".join(outcome.part.folder for outcome in found.failures)
        raise RuntimeError(f"{len(found.failures)} parts failed ({names}); the report says why")


def _chosen(names: tuple[str, ...]) -> tuple[str, ...] | None:
    if NONE in names and len(names) > 1:
        raise UsageError(f"{NONE!r} leaves out everything: do not name {', '.join(set(names) - {NONE})} beside it")
    return () if names == (NONE,) else names or None


def _say(found: Audit, terminal: Terminal) -> None:
    """Print a line for every part, and the word for every attacker."""
    from erasure.eval.audits.page import section
    from erasure.eval.audits.parts import GRADES

    sections = [section(found, grade) for grade in GRADES]
    rows = [
        [each.title, line.name, line.concept, line.rate or line.detail, line.chance, line.word]
        for each in sections for line in each.lines
    ]  # fmt: skip
    terminal.table(("attacker has", "tried", "concept", "shows it", "by chance", "verdict"), rows)
    terminal.table(("attacker has", "verdict"), [[each.title, each.word] for each in sections])
