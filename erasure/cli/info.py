"""`erasure info`: what an erasure is and holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import tyro

from erasure.cards import figure
from erasure.cli.terminal import Terminal, parse
from erasure.shown import number

if TYPE_CHECKING:
    from erasure.artifact import Erasure

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
    """Show what an erasure is, what it changes, and how it was measured."""

    erasure: tyro.conf.Positional[str]
    """Folder, or repository of the Hugging Face Hub."""
    json: bool = False
    """Print JSON."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(InfoOptions, "info", argv)
    from erasure.artifact import Erasure

    made = Erasure.load(options.erasure)
    tensors: list[_Tensor] = [
        {"name": name, "form": "low-rank", "shape": [edit.up.shape[0], edit.down.shape[1]], "rank": edit.down.shape[0]}
        for name, edit in made.low_rank.items()
    ]
    tensors += [
        {
            "name": name, "form": "input map", "shape": [int(edit.outputs), edit.down.shape[1]],
            "rank": edit.down.shape[0],
        }
        for name, edit in made.edits.maps.items()
    ]  # fmt: skip
    tensors += [
        {"name": name, "form": "full-rank", "shape": list(delta.shape), "rank": None}
        for name, delta in made.deltas.items()
    ]
    tensors += [
        {"name": name, "form": "features", "shape": list(edit.w_dec.shape), "rank": None}
        for name, edit in made.edits.features.items()
    ]
    if options.json:
        config = dataclasses.asdict(made.config)
        terminal.result({"name": made.name, "bytes": made.size_bytes, "config": config, "tensors": tensors})
        return
    terminal.table(("erasure", made.name), facts(made))
    shown = [
        [
            str(row["name"]),
            row["form"] + (f" ({row['rank']})" if row["rank"] else ""),
            "x".join(map(str, row["shape"])),
        ]
        for row in tensors
    ]
    terminal.table(("changes", "form", "shape"), shown)
    gates = [
        [concept, kind + (" (decides)" if kind == gate["decides"] else ""), *map(str, map(gate[kind].get, GATE_RATES))]
        for concept, gate in made.config.gates.items()
        for kind in ("features", "probe")
    ]
    if gates:
        terminal.table(("gate", "by", *map(str.upper, GATE_RATES)), gates)
    if made.config.evaluation:
        terminal.table(("measured", "value"), [[key, figure(v)] for key, v in made.config.evaluation.items()])


def facts(made: Erasure) -> list[list[str]]:
    """Rows of name and value about an erasure."""
    config = made.config
    concepts = ", ".join(f"{c['target']} ({c.get('kind', 'object')})" for c in config.concepts)
    options = ", ".join(f"{key}={format_value(value)}" for key, value in config.strategy_config.items())
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    rows = [
        ["erases", concepts],
        ["strategy", config.strategy],
        ["options", options],
        ["seed", str(config.seed)],
        ["base model", f"{config.base.get('model', 'unknown')} ({config.family})"],
        ["lives in", ", ".join(config.carriers)],
        ["protects", config.protects],
        ["made in", f"{number(config.cost['seconds'], '.1f')} s" if "seconds" in config.cost else ""],
        ["made with", versions],
        ["size", f"{made.size_bytes / 1e6:.2f} MB"],
    ]
    return [row for row in rows if row[1]]


def format_value(value: object) -> str:
    """A number with four digits, anything else as it is."""
    return number(value) if isinstance(value, float) else str(value)
