"""Erase several concepts of Canvas in one erasure, many times over, and measure what is gone and what is kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

import erasure
from erasure.assets.build.measured import DIGITS, Row, figure
from erasure.assets.build.sweep import RATES
from erasure.attach import ErasureManager
from erasure.eval import evaluate
from erasure.eval.results import Results
from erasure.eval.statistics import cluster_bootstrap
from erasure.eval.sweeps.means import mean_at
from erasure.world import World

ONLY = "the only set"
"""Said of the set with the least AA where there is no other."""


def draws(count: int, times: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Draw sets of concepts, no set twice, each in the order of the world.

    Args:
        count: Concepts in a set.
        times: How many sets.
        seed: Of the draw. The first sets are the same for every number of sets.

    Raises:
        ValueError: There are not so many sets.
    """
    world = World.at("canvas-sd")
    names = [*world.objects, *world.styles]
    rng = np.random.default_rng([seed, count])
    found: dict[tuple[str, ...], None] = {}
    for _ in range(1000 * times):
        chosen = sorted(rng.choice(len(names), size=count, replace=False).tolist())
        # Where every style is erased, no image is left to tell what is kept.
        if any(names[i] in world.styles for i in range(len(names)) if i not in chosen):
            found.setdefault(tuple(names[i] for i in chosen))
        if len(found) == times:
            return list(found)
    raise ValueError(f"{times} sets of {count} concepts were asked for, found {len(found)}: ask for fewer sets")


def folder_of(out: Path, strategy: str, names: tuple[str, ...]) -> Path:
    """Folder of the results of one set."""
    return out / f"{len(names)}-{strategy}" / "-".join(names)


def measure(
    out: Path, strategy: str, sets: list[tuple[str, ...]], size: str, share: tuple[int, int], suite: str = "canvas"
) -> None:
    """Make and measure; `share` (i, n) takes every n-th set from the i-th on, for several processes at once.

    A set whose results are there already is left as it is.
    """
    torch.set_num_threads(1)
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    for names in sets[share[0] :: share[1]]:
        folder = folder_of(out, strategy, names)
        if (folder / "results.json").is_file():
            continue
        made = erasure.erase(pipe, list(names), strategy, progress=False)
        wanted = list(made.concepts)
        found = evaluate(pipe, suite, wanted, size=size, out=folder, images=False, report=False, progress=False)
        ErasureManager(pipe).unload()
        made.save(folder / "erasure", overwrite=True)
        rates = {name: round(found.get(name)["value"], 3) for name in RATES}
        print(", ".join(names), json.dumps(rates), f"{made.config.cost['seconds']:.1f} s", flush=True)


def rows(out: Path, strategy: str, sets: list[tuple[str, ...]]) -> list[Row]:
    """One row for each number of concepts: mean rates with 95 % intervals over the sets, and the least AA.

    One set alone has no interval.
    """
    made: list[Row] = []
    for count in sorted({len(names) for names in sets}):
        same = [names for names in sets if len(names) == count]
        results = [Results.load(folder_of(out, strategy, names) / "results.json") for names in same]
        row: Row = {"concepts": count, "sets": len(same)}
        for rate in RATES:
            values = np.asarray([result.get(rate)["value"] for result in results])
            if len(same) == 1:
                row[rate] = figure({"value": float(values[0])})
            else:
                row[rate] = figure(cluster_bootstrap(partial(mean_at, values), range(len(values))))
        worst = int(values.argmin())
        row["least"] = round(float(values[worst]), DIGITS)
        row["least_of"] = ", ".join(same[worst]) if len(same) > 1 else ONLY
        made.append(row)
    return made
