"""`erasure strategies`: what there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from erasure.cli.arguments import parse
from erasure.cli.described import options_of
from erasure.cli.terminal import Terminal
from erasure.strategies import STRATEGIES


@dataclass(kw_only=True)
class StrategiesOptions:
    """List the strategies, with what each needs of a model, what it protects, and its cost."""

    json: bool = False
    """Print JSON, with the options and presets of each."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(StrategiesOptions, "strategies", argv)
    rows = [describe(name) for name in STRATEGIES.names()]
    if options.json:
        terminal.result(rows)
        return
    columns = ("name", "what", "needs", "protects", "cost", "paper")
    terminal.table(
        columns, [[", ".join(v) if isinstance(v := row[c], list) else str(v) for c in columns] for row in rows]
    )


def describe(name: str) -> dict[str, Any]:
    """A strategy as plain data."""
    attributes, options = STRATEGIES.facts(name).attributes, options_of(STRATEGIES, name)
    return {
        "name": name,
        "what": attributes["title"],
        **{fact: attributes[fact] for fact in ("needs", "protects", "cost", "paper", "carriers", "presets")},
        "options": {
            field.name: {"allowed": options.describe(field.name), "default": field.default}
            for field in dataclasses.fields(options)
        },
    }
