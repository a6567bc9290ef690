"""Erase concepts of Canvas, each alone with every strategy, measure, and make the tables of docs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import erasure
from erasure.assets.world import OBJECTS, STYLES, UNSAFE
from erasure.attach import ErasureManager
from erasure.concept import Concept
from erasure.eval import evaluate
from erasure.eval.metrics.unlearncanvas import average_interval
from erasure.eval.results import Results
from erasure.eval.statistics import Interval, cluster_bootstrap, wilson
from erasure.world import World

RATES = ("UA", "IRA", "CRA", "AA")


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


def measure(
    out: Path,
    strategies: tuple[str, ...],
    size: str,
    share: tuple[int, int],
    suite: str = "canvas",
    model: str = "canvas-sd",
    only: Sequence[str] = (),
) -> None:
    """Make and measure erasures.

    Args:
        out: Results, a folder for each concept and strategy; what is there already is not made again.
        strategies: What to compare.
        size: Of the suite.
        share: (i, n) takes every n-th concept from the i-th on, for several processes at once.
        suite: Its name.
        model: Name of an embedded model, or a folder.
        only: Names of concepts, of those that are measured; all of them when empty.
    """
    torch.set_num_threads(1)
    pipe = erasure.load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    chosen = [concept for concept in measured() if not only or concept.target in only]
    for concept in chosen[share[0] :: share[1]]:
        for strategy in strategies:
            folder = out / f"{concept.target}-{strategy}"
            if (folder / "results.json").is_file():
                continue
            made = erasure.erase(pipe, concept, strategy, progress=False)
            found = evaluate(pipe, suite, [concept], size=size, out=folder, images=False, report=False, progress=False)
            ErasureManager(pipe).unload()
            made.save(folder / "erasure", overwrite=True)
            rates = {name: round(found.get(name)["value"], 3) for name in RATES}
            print(folder.name, json.dumps(rates), f"{made.config.cost['seconds']:.1f} s", flush=True)


def rows(out: Path, strategies: Sequence[str], of: Mapping[str, Sequence[str]] | None = None) -> list[dict[str, Any]]:
    """Means over concepts with 95 % intervals, by strategy and group of concepts.

    Intervals are the outer bounds of a bootstrap over concepts and of Wilson's interval over all their images, because
    a bootstrap has no width where nothing fails.

    Args:
        out: Where `measure` left its results.
        strategies: What to compare.
        of: Names of concepts by the group that a row is about; see `groups` when left out.
    """
    made = []
    for strategy in strategies:
        for group, names in (groups() if of is None else of).items():
            folders = [out / f"{name}-{strategy}" for name in names]
            results = [Results.load(folder / "results.json") for folder in folders]
            row: dict[str, Any] = {"strategy": strategy, "concepts": f"{group}: {len(names)}"}
            pooled: list[Interval] = []
            for rate in RATES:
                found = [result.get(rate) for result in results]
                values, images = [part["value"] for part in found], sum(part["n"] for part in found)
                spread = average_interval(*pooled) if rate == "AA" else wilson(float(np.mean(values)) * images, images)
                pooled.append(spread)
                drawn = cluster_bootstrap(partial(mean_at, np.asarray(values)), range(len(names)))
                row[rate] = Interval(drawn.value, min(drawn.low, spread.low), max(drawn.high, spread.high))
            costs = [json.loads((f / "erasure" / "erasure_config.json").read_text())["cost"] for f in folders]
            row["seconds"] = float(np.mean([cost["seconds"] for cost in costs]))
            sizes = [sum(f.stat().st_size for f in (folder / "erasure").iterdir()) for folder in folders]
            row["kB"] = float(np.mean(sizes)) / 1000
            made.append(row)
    return made


def mean_at(values: np.ndarray, index: np.ndarray) -> float:
    """Mean of some values, as a bootstrap asks for it."""
    return float(values[index].mean())


def per_concept(out: Path, strategies: tuple[str, ...]) -> str:
    """One row for each concept: UA / IRA / CRA and AA with its 95 % interval, by strategy, as Markdown."""
    lines = ["| concept | " + " | ".join(f"`{s}` UA / IRA / CRA | AA" for s in strategies) + " |"]
    lines.append("|---" * (1 + 2 * len(strategies)) + "|")
    for concept in measured():
        cells = []
        for strategy in strategies:
            found = Results.load(out / f"{concept.target}-{strategy}" / "results.json")
            mean = found.get("AA")
            cells.append(" / ".join(f"{found.get(rate)['value']:.2f}" for rate in RATES[:3]))
            cells.append(f"{mean['value']:.3f} ({mean['low']:.2f}-{mean['high']:.2f})")
        lines.append(f"| {concept.target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(table: list[dict[str, Any]]) -> str:
    """Means over concepts, as they stand in `docs/numbers.md`."""
    lines = ["| method | concepts | UA | IRA | CRA | AA | seconds | kB |", "|---|---|---|---|---|---|---|---|"]
    for row in table:
        rates = " | ".join(f"{row[k].value:.3f} ({row[k].low:.2f}-{row[k].high:.2f})" for k in RATES)
        lines.append(f"| `{row['strategy']}` | {row['concepts']} | {rates} | {row['seconds']:.1f} | {row['kB']:.0f} |")
    return "\n".join(lines)
