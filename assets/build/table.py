"""Concepts of Canvas that are measured, and the table of each of them; `table.toml` says what is made of them."""

from __future__ import annotations

from pathlib import Path

from erasure.assets.build.sweep import RATES
from erasure.assets.world import OBJECTS, STYLES, UNSAFE
from erasure.concept import Concept
from erasure.eval.results import Results
from erasure.eval.sweeps.plan import Cell, SweepPlan
from erasure.world import World


def concepts() -> list[Concept]:
    """Every object and style, as the world has it."""
    world = World.at("canvas-sd")
    return [world.concept(name) for name in (*world.objects, *world.styles)]


def measured() -> list[Concept]:
    """Every second concept: the others chose the defaults."""
    return concepts()[1::2]


def groups() -> dict[str, list[str]]:
    """Measured concepts by the group that a row is about."""
    names = [concept.target for concept in measured()]
    return {
        "objects": [name for name in names if name in OBJECTS],
        "styles": [name for name in names if name in STYLES],
        "weapons, counted above too": [name for name in names if name in UNSAFE],
    }


def per_concept(chosen: SweepPlan, out: Path) -> str:
    """One row for each concept: UA / IRA / CRA and AA with its 95 % interval, by method, as Markdown.

    Args:
        chosen: The sweep, of one model and seed.
        out: Where its results are.
    """
    heads = [f"`{method.label}` UA / IRA / CRA | AA" for method in chosen.methods]
    lines = ["| concept | " + " | ".join(heads) + " |", "|---" * (1 + 2 * len(heads)) + "|"]
    for concept in chosen.concepts:
        cells = []
        for method in chosen.methods:
            cell = Cell(chosen.models[0], method, concept, chosen.seeds[0])
            found = Results.load(out / cell.folder / chosen.measures[0].folder)
            mean = found.get("AA")
            cells.append(" / ".join(f"{found.get(rate)['value']:.2f}" for rate in RATES[:3]))
            cells.append(f"{mean['value']:.3f} ({mean['low']:.2f}-{mean['high']:.2f})")
        lines.append(f"| {concept} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
