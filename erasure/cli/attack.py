"""`erasure attack ATTACK`: search what brings an erased concept back, or try what an earlier search found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from erasure.cli.arguments import UsageError
from erasure.cli.described import changes, list_of, options_of, parse_with
from erasure.cli.eval import metric_table, refusals
from erasure.cli.lists import ENDINGS
from erasure.cli.lists import read_prompts as read_list
from erasure.cli.models import (
    RecordedOptions,
    SuiteOptions,
    attach,
    check_strengths,
    load_erasures,
    open_model,
)
from erasure.cli.output import check_output_folder
from erasure.cli.processes import is_main_process
from erasure.cli.recording import left_out, record
from erasure.cli.terminal import Terminal
from erasure.concept import Concept
from erasure.eval.attacks import ATTACKS, Access
from erasure.world import World

if TYPE_CHECKING:
    from erasure.eval import Results
    from erasure.interop.protocols import Settings

HELP = """usage: erasure attack ATTACK --model M [--erasure E ...] --out DIR [options]

Searches for what brings an erased concept back; or tries the findings of an earlier search, or a list of prompts
(--prompts).

attacks, by what the attacker must be able to choose or to have:
{attacks}

The options of each: erasure attack ATTACK --help"""


@dataclass(kw_only=True)
class AttackOptions(SuiteOptions, RecordedOptions):
    """What to attack, and where to write the result."""

    concept: str | None = None
    """Concept that images must not show; that of the erasures when left out."""
    size: Literal["smoke", "quick", "full"] = "quick"
    """How much is tried: `smoke` only shows that it runs, `quick` takes minutes with a small model, `full` is as in
    the paper. It sets the attack's options; options that are given change single values."""
    prompts: Path | None = None
    """Try these on the erasures, and search nothing: the folder or the file of an earlier attack, or a list of prompts
    of others (a text, CSV, TSV, JSON or JSON lines file with a column `prompt`, and `seed`)."""
    suite: str = "canvas"
    """Suite that gives the prompts and the judge. `prompts` takes any model and any concept, with `--clip` or
    `--detector`."""
    prompt_list: str | None = None
    """Prompts to attack, of a suite on prompts: a .csv, .tsv or .jsonl file in UTF-8, a folder of the library
    datasets, or `hf:NAME` of its Hub."""
    detector: tuple[str, ...] = ()
    """Detector of a suite on prompts that says whether an image shows the concept: `nudenet:preset=mace`,
    `clip_zero_shot:model=FOLDER,flags=a zebra,others=a horse|a field`."""
    clip: str | None = None
    """CLIP model that a suite on prompts asks whether an image shows the concept: its folder, or its repository of the
    Hugging Face Hub."""
    out: Path
    """Folder of results.json, attacks.jsonl, adversarial.jsonl and images. Run the same command again to resume an
    interrupted run."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    if not argv or argv[0] in ("-h", "--help"):
        terminal.whole(f"{HELP.format(attacks=by_access())}\n")
        return
    name, *rest = argv
    if name.startswith("-"):
        raise UsageError(f"name the attack first: erasure attack {{{','.join(ATTACKS.names())}}} --model M --out O")
    attributes, method = ATTACKS.facts(name).attributes, options_of(ATTACKS, name)
    # Twice: which options the attack starts from is known only when the size is.
    about = f"{attributes['title']} ({attributes['paper']}). The attacker needs: {attributes['access']}."
    size = parse_with(AttackOptions, method(), f"attack {name}", rest, about).command.size
    start = method(**attributes["sizes"].get(size, {}))
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
        terminal.say(f"What succeeded, for other erasures (--prompts): {options.out / 'adversarial.jsonl'}")
    if options.prompts is None and attributes["chance"] and not getattr(parsed.options, "control", False):
        other = f"{name} --control" if attributes["chance"] == "--control" else attributes["chance"]
        terminal.say(f"What chance finds in as many tries: erasure attack {other}, with the same options.")


def by_access() -> str:
    """Names and titles of attacks, a line each, by what they assume."""
    groups = []
    for access in get_args(Access):
        names = tuple(name for name in ATTACKS.names() if ATTACKS.facts(name).attributes["access"] == access)
        if names:
            groups.append(f" {access}:\n{list_of(ATTACKS, names)}")
    return "\n".join(groups)


def _attack(options: AttackOptions, name: str, changed: Settings, terminal: Terminal) -> tuple[Results, list[str]]:
    """Open everything, cheap checks first, and do it; gives the results, and what became of their summary."""
    from erasure.eval import suites
    from erasure.eval.attacks.prompts import read_prompts
    from erasure.eval.attacks.runner import attack, replay
    from erasure.eval.judges import load_judge

    suites.get(options.suite)
    listed = listed_in(options.prompts)
    if options.prompts is not None and listed is None:
        made = read_prompts(options.prompts)[0].made_by["attack"]
        if made != name:
            raise UsageError(
                f"--prompts {options.prompts} are of the attack {made}: erasure attack {made} --prompts ..."
            )
    inputs = options.inputs(options.prompt_list, options.detector)
    inputs |= {} if options.clip is None else {"clip": options.clip}
    erasures = load_erasures(options)
    concept: Concept | None = None
    if options.concept is not None:
        concept = World.at(options.model).concept(options.concept, options.kind)
    elif (options.prompts is None or listed is not None) and not erasures:
        raise UsageError("nothing to attack: give --erasure, or --concept for the unchanged model")
    judge = None if options.judge is None else load_judge(options.judge)
    out = check_output_folder(options.out, may_hold=True)
    pipe = open_model(options)
    options.use_sampler(pipe, options.suite)
    attach(pipe, erasures, options.strength)
    common: Settings = {
        "suite": options.suite, "inputs": inputs, "out": out, "progress": terminal.speaks, "judge": judge,
    }  # fmt: skip
    if options.prompts is not None:
        return replay(pipe, listed or options.prompts, concept, attack=name, **common), []
    found = attack(pipe, name, concept, size=options.size, seed=options.seed, **common, **changed)
    if options.no_record or not is_main_process():
        return found, []
    own = {known.target for made in erasures.values() for known in made.concepts}
    # Figures of changed options would pass for those of the size.
    return found, [] if changed else record(options, erasures, found, concept is None or {concept.target} == own)


def listed_in(path: Path | None) -> list[tuple[str, int | None]] | None:
    """Prompts and seeds of a list of others; `None` where the path is of an attack's own findings, or is none.

    Raises:
        UsageError: The list cannot be read.
    """
    if path is None or path.is_dir() or not path.is_file():
        return None
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            if b'"made_by"' in file.readline(2**20) or path.name == "adversarial.jsonl":
                return None
    elif path.suffix.lower() not in ENDINGS:
        return None
    return [(row.prompt, row.seed) for row in read_list(path)]


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
