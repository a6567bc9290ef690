"""Concepts of Canvas that are measured, and the rows of their tables; `table.toml` says what is made of them."""

from __future__ import annotations

from pathlib import Path

from erasure.assets.build.measured import Figure, Row, figure
from erasure.assets.build.sweep import RATES, chosen_cells, rows, with_all
from erasure.assets.world import OBJECTS, STYLES, UNSAFE
from erasure.concept import Concept
from erasure.eval.results import Results
from erasure.eval.statistics import wilson
from erasure.eval.sweeps.plan import Cell, SweepPlan
from erasure.eval.table import SAMPLES, read_rows
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


def means(chosen: SweepPlan, out: Path) -> list[Row]:
    """Means over each group of concepts and over all, and how often erased objects keep the style that was asked for.

    Args:
        chosen: The sweep, of one model.
        out: Where its results are.
    """
    names = ("method", "group", "concepts", *RATES, "drift", "seconds", "kB")
    made = chosen_cells(rows(with_all(chosen), out), names)
    for row in made:
        if row["group"] == "objects":
            row["own_style"] = own_style(chosen, out, str(row["method"]))
    return made


def own_style(chosen: SweepPlan, out: Path, method: str) -> Figure:
    """Share of the images of erased objects that are in the style that their prompt names, with Wilson's interval."""
    kept: list[bool] = []
    for cell in chosen.cells:
        folder = out / cell.folder / chosen.measures[0].folder
        if cell.method.label != method or cell.concept not in chosen.groups["objects"] or not folder.is_dir():
            continue
        for sample in read_rows(folder / f"{SAMPLES}.jsonl"):
            asked, judged = sample.get("style"), sample.get("judged")
            if sample["variant"] == "after" and sample["role"] == "target" and asked and judged:
                kept.append(judged["style"] == asked)
    if not kept:
        return figure({"reason": "no image of an erased object was judged"})
    return figure(wilson(sum(kept), len(kept)), len(kept))


def per_concept(chosen: SweepPlan, out: Path) -> list[Row]:
    """Rates of each concept and method, with the intervals of their own images.

    Args:
        chosen: The sweep, of one model and seed.
        out: Where its results are.
    """
    made: list[Row] = []
    for concept in chosen.concepts:
        for method in chosen.methods:
            cell = Cell(chosen.models[0], method, concept, chosen.seeds[0])
            found = Results.load(out / cell.folder / chosen.measures[0].folder)
            rates = {rate: figure(found.get(rate)) for rate in RATES}
            made.append({"concept": concept, "method": method.label, **rates})
    return made
