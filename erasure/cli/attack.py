"""`erasure attack ATTACK`: search prompts that bring an erased concept back, or try those of an earlier search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erasure.cli.described import changes, list_of, options_of, parse_with
from erasure.cli.eval import metric_table, refusals
from erasure.cli.models import (
    ErasedModelOptions,
    attach,
    check_strengths,
    load_erasures,
    open_model,
)
from erasure.cli.recording import left_out, record
from erasure.cli.terminal import Terminal, UsageError, is_main_process, output_folder
from erasure.concept import Concept, Kind
from erasure.eval.attacks import ATTACKS
from erasure.world import World

if TYPE_CHECKING:
    from erasure.eval import Results
    from erasure.interop.protocols import Settings

HELP = """usage: erasure attack ATTACK --model M [--erasure E ...] --out DIR [options]

Searches prompts that bring an erased concept back, or tries those of an earlier search (--prompts).

attacks:
{attacks}

The options of each: erasure attack ATTACK --help"""


@dataclass(kw_only=True)
class AttackOptions(ErasedModelOptions):
    """What to attack, and where to write the result."""

    concept: str | None = None
    """What must not be seen; that of the erasures when left out."""
    kind: Kind | None = None
    """What the concept is. Left out, a Canvas model says it, and other models take it for an object."""
    size: Literal["smoke", "quick", "full"] = "quick"
    """`smoke`: does it run; `quick`: minutes with a small model; `full`: as the paper has it. Sets the attack's
    options; those that are given change single values."""
    prompts: Path | None = None
    """Adversarial prompts of an earlier attack, its folder or file: try them on these erasures, search none."""
    suite: str = "canvas"
    """Where prompts and judge come from."""
    seed: int = 0
    """Seed of the samples' noise, and through it of everything random."""
    judge: str | None = None
    """Detector in the place of the suite's own: the folder of a judge, or `module:attribute` of a function or class of
    your own that takes a list of images and gives answers with `.object` and `.style`."""
    no_record: bool = False
    """Do not write a summary of the results into the erasure's config and card, where `erasure info` finds it."""
    out: Path
    """Folder of results.json, attacks.jsonl, adversarial.jsonl and images. The same command again goes on where a
    killed one stopped."""
    json: bool = False
    """Print results.json, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP.format(attacks=list_of(ATTACKS)))
        return
    name, *rest = argv
    if name.startswith("-"):
        raise UsageError(f"name the attack first: erasure attack {{{','.join(ATTACKS.names())}}} --model M --out O")
    told, method = ATTACKS.facts(name).told, options_of(ATTACKS, name)
    # Twice: which options the attack starts from is known only when the size is.
    about = f"{told['title']} ({told['paper']}). The attacker needs: {told['access']}."
    size = parse_with(AttackOptions, method(), f"attack {name}", rest, about).command.size
    start = method(**told["sizes"].get(size, {}))
    parsed = parse_with(AttackOptions, start, f"attack {name}", rest, about)
    options: AttackOptions = parsed.command
    terminal.json_only = options.json
    check_strengths(options)
    changed = changes(parsed.options, start)
    if options.prompts is not None and changed:
        raise UsageError(f"--prompts tries what was found before: leave out {', '.join(sorted(changed))}")
    found, remarks_on_record = _attack(options, name, changed, terminal)
    if not is_main_process():
        return
    results = found.to_dict()
    if options.json:
        terminal.result(results)
        return
    columns, rows = metric_table(results["metrics"])
    terminal.table(columns, rows)
    terminal.say(*left_out(results["model"]), *remarks(results["metrics"]), *remarks_on_record)
    if options.prompts is None:
        terminal.say(f"Adversarial prompts, for other erasures (--prompts): {options.out / 'adversarial.jsonl'}")
    if options.prompts is None and not told["is_control"]:
        terminal.say("What chance finds in as many tries: erasure attack random_prefix, with the same options.")


def _attack(options: AttackOptions, name: str, changed: Settings, terminal: Terminal) -> tuple[Results, list[str]]:
    """Open everything, cheap checks first, and do it; gives the results, and what became of their summary."""
    from erasure.eval import suites
    from erasure.eval.attacks.prompts import read_prompts
    from erasure.eval.attacks.runner import attack, replay
    from erasure.eval.judges import load_judge

    suites.get(options.suite)
    if options.prompts is not None and (made := read_prompts(options.prompts)[0].made_by["attack"]) != name:
        raise UsageError(f"--prompts {options.prompts} are of the attack {made}: erasure attack {made} --prompts ...")
    erasures = load_erasures(options)
    concept: Concept | None = None
    if options.concept is not None:
        concept = World.at(options.model).concept(options.concept, options.kind)
    elif options.prompts is None and not erasures:
        raise UsageError("nothing to attack: give --erasure, or --concept for the unchanged model")
    judge = None if options.judge is None else load_judge(options.judge)
    out = output_folder(options.out, may_hold=True)
    pipe = open_model(options)
    attach(pipe, erasures, options.strength)
    common: Settings = {"suite": options.suite, "out": out, "progress": terminal.speaks, "judge": judge}
    if options.prompts is not None:
        return replay(pipe, options.prompts, concept, **common), []
    found = attack(pipe, name, concept, size=options.size, seed=options.seed, **common, **changed)
    if options.no_record or not is_main_process():
        return found, []
    own = {known.target for made in erasures.values() for known in made.concepts}
    # Figures of changed options would pass for those of the size.
    return found, [] if changed else record(options, erasures, found, concept is None or {concept.target} == own)


def remarks(metrics: Sequence[Settings]) -> list[str]:
    """What a reader of the rates must know besides."""
    from erasure.eval.rows import is_figure

    lines = refusals(metrics)
    for row in filter(is_figure, metrics):
        if row.get("missing") and row.get("value", 0) is not None:
            why = f" ({row['reason']})" if row.get("reason") else "; attacks.jsonl says why"
            lines.append(f"{row['name']}: {row['missing']} prompts have no outcome{why}.")
        texts = row.get("retokenised", {})
        if texts.get("changed"):
            lines.append(
                f"The tokeniser reads {texts['changed']} of {texts['texts']} texts as other tokens than were searched "
                f"for, {texts['cut']} of them as too many to be drawn."
            )
    return lines
