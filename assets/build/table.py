"""Erase every concept of Canvas, one at a time, with every strategy, measure each, and make the README's tables."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import erasure
from erasure.assets.world import ANCHORS, OBJECTS, STYLES, UNSAFE
from erasure.attach import ErasureManager
from erasure.concept import Concept, Kind
from erasure.eval import evaluate
from erasure.eval.results import Results

TUNED_ON = ("cat", "gun", "ink")
"""Concepts that defaults were chosen on; the table reports the others separately."""
RATES = ("UA", "IRA", "CRA", "AA")


def concepts() -> list[Concept]:
    """Every object and style, with the anchor that the world suggests."""

    def kind(name: str) -> Kind:
        return "style" if name in STYLES else "unsafe" if name in UNSAFE else "object"

    return [Concept(name, kind=kind(name), anchor=ANCHORS[name]) for name in (*OBJECTS, *STYLES)]


def measure(out: Path, strategies: tuple[str, ...], size: str, share: tuple[int, int]) -> None:
    """Make and measure; `share` (i, n) takes every n-th concept from the i-th on, for several processes at once."""
    torch.set_num_threads(1)
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    for concept in concepts()[share[0] :: share[1]]:
        for strategy in strategies:
            folder = out / f"{concept.target}-{strategy}"
            if (folder / "results.json").is_file():
                continue
            made = erasure.erase(pipe, concept, strategy, progress=False)
            found = evaluate(
                pipe, "canvas", [concept], size=size, out=folder, images=False, report=False, progress=False
            )
            ErasureManager(pipe).unload()
            made.save(folder / "erasure", overwrite=True)
            rates = {name: round(found.get(name)["value"], 3) for name in RATES}
            print(folder.name, json.dumps(rates), f"{made.config.cost['seconds']:.1f} s", flush=True)


def rows(out: Path, strategies: tuple[str, ...]) -> list[dict[str, Any]]:
    """Means over concepts with 95 % intervals (bootstrap over concepts), by strategy and group of concepts."""
    groups = {
        "objects": [name for name in OBJECTS if name not in TUNED_ON],
        "styles": [name for name in STYLES if name not in TUNED_ON],
        "weapons": [name for name in UNSAFE if name not in TUNED_ON],
        f"tuned on ({', '.join(TUNED_ON)})": list(TUNED_ON),
    }
    rng, made = np.random.default_rng(0), []
    for strategy in strategies:
        for group, names in groups.items():
            values: dict[str, list[float]] = defaultdict(list)
            for name in names:
                folder = out / f"{name}-{strategy}"
                found = Results.load(folder / "results.json")
                for rate in RATES:
                    values[rate].append(found.get(rate)["value"])
                config = json.loads((folder / "erasure" / "erasure_config.json").read_text())
                values["seconds"].append(config["cost"]["seconds"])
                values["kB"].append(sum(f.stat().st_size for f in (folder / "erasure").iterdir()) / 1000)
            row: dict[str, Any] = {"strategy": strategy, "concepts": f"{group}: {len(names)}"}
            for key, found_values in values.items():
                sample = np.asarray(found_values)
                means = sample[rng.integers(len(sample), size=(2000, len(sample)))].mean(1)
                row[key] = (float(sample.mean()), *np.quantile(means, [0.025, 0.975]).tolist())
            made.append(row)
    return made


def per_concept(out: Path, strategies: tuple[str, ...]) -> str:
    """One row for each concept: UA / IRA / CRA and AA with its 95 % interval, by strategy, as Markdown."""
    lines = ["| concept | " + " | ".join(f"`{s}` UA / IRA / CRA | AA" for s in strategies) + " |"]
    lines.append("|---" * (1 + 2 * len(strategies)) + "|")
    for concept in concepts():
        cells = []
        for strategy in strategies:
            found = Results.load(out / f"{concept.target}-{strategy}" / "results.json")
            mean = found.get("AA")
            cells.append(" / ".join(f"{found.get(rate)['value']:.2f}" for rate in RATES[:3]))
            cells.append(f"{mean['value']:.3f} ({mean['low']:.2f}-{mean['high']:.2f})")
        lines.append(f"| {concept.target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(table: list[dict[str, Any]]) -> str:
    """The means over concepts, as they stand in the README."""
    lines = ["| method | concepts | UA | IRA | CRA | AA | seconds | kB |", "|---|---|---|---|---|---|---|---|"]
    for row in table:
        rates = " | ".join(f"{row[k][0]:.3f} ({row[k][1]:.2f}-{row[k][2]:.2f})" for k in RATES)
        lines.append(
            f"| `{row['strategy']}` | {row['concepts']} | {rates} | {row['seconds'][0]:.1f} | {row['kB'][0]:.0f} |"
        )
    return "\n".join(lines)
