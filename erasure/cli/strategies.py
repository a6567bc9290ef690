"""`erasure strategies`: what there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erasure.cli.terminal import Terminal, parse

if TYPE_CHECKING:
    from erasure.strategies import Strategy


@dataclass(kw_only=True)
class StrategiesOptions:
    """List the strategies: what each is, on which model families it works, what it protects, at what cost."""

    json: bool = False
    """Print JSON, with the options and presets of each."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(StrategiesOptions, "strategies", argv)
    from erasure.strategies import available

    rows = [describe(strategy) for strategy in available().values()]
    if options.json:
        terminal.result(rows)
        return
    columns = ("name", "what", "families", "protects", "cost", "paper")
    terminal.table(
        columns, [[", ".join(v) if isinstance(v := row[c], list) else str(v) for c in columns] for row in rows]
    )


def describe(strategy: type[Strategy]) -> dict[str, object]:
    """A strategy as plain data."""
    return {
        "name": strategy.name,
        "what": strategy.title,
        "families": list(strategy.families),
        "protects": strategy.protects,
        "cost": strategy.cost,
        "paper": strategy.paper,
        "carriers": list(strategy.carriers),
        "presets": dict(strategy.presets),
        "options": {
            field.name: {
                "allowed": strategy.describe(field.name),
                "default": None if field.default is dataclasses.MISSING else field.default,
            }
            for field in dataclasses.fields(strategy)
        },
    }
