"""`erasure info`: what an erasure is and holds, and what made a picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import tyro

from erasure.cards import figure
from erasure.cli.arguments import UsageError, parse
from erasure.cli.models import read_erasure
from erasure.cli.records import show_record
from erasure.cli.terminal import Terminal
from erasure.picture_record import is_png
from erasure.shown import number

if TYPE_CHECKING:
    from erasure.artifact import Erasure
    from erasure.schema import ErasureConfig

CONFIG_FILE, INDEX_FILE, TRACE_FILE = "erasure_config.json", "model_index.json", "erased.json"
ATTACHED_FILE = "erasures/attached.json"
"""By these a folder is told apart, before anything that takes seconds is imported."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Endings of pictures."""

GATE_RATES = ("tpr", "fpr", "auc")
"""What is shown of a gate; the JSON has its curve too."""


class _Tensor(TypedDict):
    """What an erasure holds of one tensor or block."""

    name: str
    form: str
    shape: list[int]
    rank: int | None


@dataclass(kw_only=True)
class InfoOptions:
    """Show what an erasure is, what it changes, and how it was measured; or what made a picture."""

    erasure: tyro.conf.Positional[str]
    """Folder of an erasure, or of a pipeline that erasures are part of or lie beside; or a repository of the Hugging
    Face Hub that holds an erasure; or a PNG file that `erasure generate`, `remove` or `demo` wrote."""
    json: bool = False
    """Print JSON."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(InfoOptions, "info", argv)
    terminal.json_only = options.json
    folder = Path(options.erasure)
    if is_png(folder) or (folder.suffix.lower() in PICTURES and os.path.isfile(folder)):
        show_record(folder, terminal)
        return
    if os.path.isdir(folder) and not os.path.lexists(folder / CONFIG_FILE):
        if os.path.lexists(folder / TRACE_FILE):
            show_baked(folder, terminal)
            return
        if os.path.lexists(folder / ATTACHED_FILE):
            show_beside(folder, terminal)
            return
        if os.path.lexists(folder / INDEX_FILE):
            raise UsageError(
                f"{folder} holds a pipeline and no word of what was erased in it ({TRACE_FILE} is missing): a stock "
                "model, or one that was saved by an earlier version"
            )
    made = read_erasure(options.erasure)
    if options.json:
        terminal.result(described(made))
    else:
        show(made, terminal)


def show_baked(folder: Path, terminal: Terminal) -> None:
    """Show what is erased in the weights of a pipeline's folder."""
    from erasure.baked import read_trace

    trace = read_trace(folder)
    if terminal.json_only:
        terminal.result({"baked": [{**entry, "config": dataclasses.asdict(config)} for entry, config in trace]})
        return
    terminal.say(f"{folder} is a pipeline whose weights are erased; nothing can be taken off again.")
    for entry, config in trace:
        strength = ["strength", number(entry["strength"])]
        terminal.table(("erasure", entry["name"]), [*config_facts(config)[:3], strength, *config_facts(config)[3:]])
        show_evaluation(config, terminal)


def show_beside(folder: Path, terminal: Terminal) -> None:
    """Show the erasures beside a pipeline that was saved with `fuse=False`."""
    from erasure.pipelines.mixin import read_attached

    attached = read_attached(folder)
    if terminal.json_only:
        found = [{**described(made), "name": name, "strength": value} for name, (made, value) in attached.items()]
        terminal.result({"beside": found})
        return
    terminal.say(f"{folder} is a stock pipeline with erasures beside it; they can be taken off.")
    for name, (made, strength) in attached.items():
        terminal.table(("erasure", name), [*facts(made), ["strength", number(strength)]])
        show_evaluation(made.config, terminal)


def described(made: Erasure) -> dict[str, object]:
    """An erasure as plain data."""
    config = dataclasses.asdict(made.config)
    return {"name": made.name, "bytes": made.size_bytes, "config": config, "tensors": tensors_of(made)}


def tensors_of(made: Erasure) -> list[_Tensor]:
    """List the tensors and blocks that an erasure changes."""
    low_rank: list[_Tensor] = [
        {"name": name, "form": "low-rank", "shape": [edit.up.shape[0], edit.down.shape[1]], "rank": edit.down.shape[0]}
        for name, edit in made.low_rank.items()
    ]
    maps: list[_Tensor] = [
        {"name": name, "form": "input map", "shape": [int(edit.outputs), edit.down.shape[1]], "rank": len(edit.down)}
        for name, edit in made.edits.maps.items()
    ]
    full: list[_Tensor] = [
        {"name": name, "form": "full-rank", "shape": list(delta.shape), "rank": None}
        for name, delta in made.deltas.items()
    ]
    features: list[_Tensor] = [
        {"name": name, "form": "features", "shape": list(edit.w_dec.shape), "rank": None}
        for name, edit in made.edits.features.items()
    ]
    safety: list[_Tensor] = [
        {"name": name, "form": "safety guidance", "shape": list(one.tokens.shape), "rank": None}
        for name, one in made.edits.safety.items()
    ]
    filters: list[_Tensor] = [
        {"name": name, "form": "prompt filter", "shape": list(one.basis.shape), "rank": None}
        for name, one in made.edits.filters.items()
    ]
    membranes: list[_Tensor] = [
        {"name": name, "form": "gated branches", "shape": [len(one.down), one.up.shape[1], one.down.shape[2]],
         "rank": one.down.shape[1]}
        for name, one in made.edits.membranes.items()
    ]  # fmt: skip
    gates: list[_Tensor] = [
        {"name": name, "form": "prompt gate", "shape": list(one.states.shape), "rank": None}
        for name, one in made.edits.gates.items()
    ]
    return [*low_rank, *maps, *full, *features, *safety, *filters, *membranes, *gates]


def show(made: Erasure, terminal: Terminal) -> None:
    """Print an erasure."""
    terminal.table(("erasure", made.name), facts(made))
    shown = [
        [row["name"], row["form"] + (f" ({row['rank']})" if row["rank"] else ""), "x".join(map(str, row["shape"]))]
        for row in tensors_of(made)
    ]
    terminal.table(("changes", "form", "shape"), shown)
    gates = [
        [concept, kind + (" (decides)" if kind == gate["decides"] else ""), *map(str, map(gate[kind].get, GATE_RATES))]
        for concept, gate in made.config.gates.items()
        for kind in ("features", "probe")
    ]
    if gates:
        terminal.table(("gate", "by", *map(str.upper, GATE_RATES)), gates)
    show_requests(made.config, terminal)
    show_evaluation(made.config, terminal)


def show_requests(config: ErasureConfig, terminal: Terminal) -> None:
    """Print the requests that were carried out one after the other, if there were several."""
    if config.requests:
        rows = [
            [
                str(place), ", ".join(each["concepts"]), each["strategy"], options_text(each["options"]) or "defaults",
                str(each["seed"]), each["version"], number(each["cost"].get("seconds"), ".1f"),
            ]
            for place, each in enumerate(config.ledger, 1)
        ]  # fmt: skip
        terminal.table(("request", "erases", "strategy", "options", "seed", "version", "seconds"), rows)


def show_evaluation(config: ErasureConfig, terminal: Terminal) -> None:
    """Print what was measured, if anything was."""
    if config.evaluation:
        terminal.table(("measured", "value"), [[key, figure(value)] for key, value in config.evaluation.items()])


def facts(made: Erasure) -> list[list[str]]:
    """Rows of name and value about an erasure."""
    return [*config_facts(made.config), ["size", f"{made.size_bytes / 1e6:.2f} MB"]]


def config_facts(config: ErasureConfig) -> list[list[str]]:
    """Rows of name and value about the config of an erasure."""
    concepts = ", ".join(f"{c['target']} ({c.get('kind', 'object')})" for c in config.concepts)
    options = options_text(config.strategy_config)
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    sessions = f" in {number(config.cost['sessions'], '.0f')} sessions" if "sessions" in config.cost else ""
    rows = [
        ["erases", concepts],
        ["strategy", config.strategy],
        ["options", options],
        ["seed", str(config.seed)],
        ["base model", f"{config.base.get('model', 'unknown')} ({config.family})"],
        ["lives in", ", ".join(config.carriers)],
        ["protects", config.protects],
        ["made for", _made_for(config)],
        ["made in", f"{number(config.cost['seconds'], '.1f')} s{sessions}" if "seconds" in config.cost else ""],
        ["made with", versions],
    ]
    return [row for row in rows if row[1]]


def options_text(options: Mapping[str, object]) -> str:
    """Options on one line: `rank=8, lr=0.001`."""
    return ", ".join(f"{key}={format_value(value)}" for key, value in options.items())


def _made_for(config: ErasureConfig) -> str:
    """Size of the drawings and length of the texts that an erasure was made for."""
    size = "drawings of {} x {} pixels".format(*config.size) if config.size else ""
    texts = f"texts of {config.text_length} tokens (max_sequence_length)" if config.text_length else ""
    return ", ".join(part for part in (size, texts) if part)


def format_value(value: object) -> str:
    """A number with four digits, anything else as it is."""
    return number(value) if isinstance(value, float) else str(value)
