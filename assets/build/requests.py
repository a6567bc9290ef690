"""Erase concepts of Canvas one after the other, each added to the erasure of those before, and measure on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import erasure
from erasure.artifact import CONFIG_FILE, Erasure
from erasure.assets.build.measured import DIGITS, Row, figure
from erasure.attach import ErasureManager
from erasure.concept import Concept
from erasure.eval import evaluate
from erasure.eval.results import Results
from erasure.eval.statistics import Interval, wilson
from erasure.world import World

FIRST = 5
"""Requests whose concepts are looked at again later: the first ones."""
ALL, NONE = "all others", "nothing"
"""Words of the tables for what the retain lists name."""


def order(count: int, seed: int = 0) -> list[str]:
    """Names of objects and styles in the order in which they are asked for.

    One style is never among them: where every style is erased, no image is left to tell what is kept.

    Args:
        count: Requests.
        seed: Of the draw. The first requests are the same for every number of them.

    Raises:
        ValueError: There are not so many.
    """
    world = World.at("canvas-sd")
    names = [*world.objects, *world.styles[1:]]
    if not 1 <= count <= len(names):
        raise ValueError(f"{count} requests were asked for, allowed: 1 to {len(names)}")
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]


def folder_of(out: Path, strategy: str, number: int, retain: bool = False) -> Path:
    """Folder of what there is after a request: the erasure in `erasure`, what was measured in `measured`."""
    return out / (f"{strategy}-retain" if retain else strategy) / f"{number:02d}"


def requested(names: Sequence[str], number: int, retain: bool, made: Erasure | None = None) -> Concept:
    """The concept of a request, with an anchor that is not erased.

    Args:
        names: What is erased, one request each.
        number: Of the request, from 1 on.
        retain: Whether its retain list names what is of its kind and was not asked for so far.
        made: The erasure of the requests before.
    """
    world = World.at("canvas-sd")
    erased = () if made is None else made.concepts
    (concept,) = world.concepts(names[number - 1], erased=erased)
    if not retain:
        return concept
    alike = world.styles if concept.kind == "style" else world.objects
    return replace(concept, retain=tuple(name for name in alike if name not in names[:number]))


def measure(
    out: Path, strategy: str, names: Sequence[str], measured: Sequence[int], size: str, retain: bool = False
) -> None:
    """Carry the requests out and measure after some of them; what is on disk is not made again.

    Args:
        out: Results.
        strategy: What erases.
        names: What is erased, one request each.
        measured: Numbers of the requests, from 1 on, after which it is measured.
        size: Of the suite.
        retain: See `requested`.
    """
    torch.set_num_threads(1)
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    made: Erasure | None = None
    for number in range(1, len(names) + 1):
        folder = folder_of(out, strategy, number, retain)
        if os.path.lexists(folder / "erasure" / CONFIG_FILE):
            made = Erasure.read(folder / "erasure")
        else:
            concept = requested(names, number, retain, made)
            made = erasure.erase(pipe, concept, strategy, add_to=made, attach=False, progress=False)
            made.save(folder / "erasure")
        if number not in measured or (folder / "measured" / "results.json").is_file():
            continue
        ErasureManager(pipe).add(made)
        wanted: list[Concept] = made.concepts
        found = evaluate(
            pipe, "canvas", wanted, size=size, out=folder / "measured", images=False, report=False, progress=False
        )
        ErasureManager(pipe).unload()
        rates = {rate: round(found.get(rate)["value"], 3) for rate in ("UA", "IRA", "drift")}
        print(f"{number} requests", json.dumps(rates), flush=True)


def first_ones(folder: Path, names: Sequence[str]) -> Interval:
    """Share of the images in which the concepts of the first requests are gone, with Wilson's interval.

    A small suite draws no image of some concepts, which then have no rate.
    """
    results = Results.load(folder / "measured" / "results.json")
    rows = [row for name in names[:FIRST] if (row := results.get("UA", concept=name))["value"] is not None]
    count = sum(row["n"] for row in rows)
    return wilson(round(sum(row["value"] * row["n"] for row in rows)), count)


def rows(
    out: Path, strategy: str, names: Sequence[str], measured: Sequence[int], retain: bool = False
) -> list[Row]:  # fmt: skip
    """A row for each time that it was measured."""
    made: list[Row] = []
    for number in (number for number in measured if number <= len(names)):
        folder = folder_of(out, strategy, number, retain)
        results, erased = Results.load(folder / "measured" / "results.json"), Erasure.read(folder / "erasure")
        rates = {name: figure(results.get(name)) for name in ("UA", "IRA", "drift")}
        row: Row = {"strategy": strategy, "retained": ALL if retain else NONE, "requests": number, **rates}
        row["UA_first"] = figure(first_ones(folder, names[:number]))
        row["seconds"] = round(float(erased.config.ledger[-1]["cost"].get("seconds", 0.0)), DIGITS)
        row["kB"] = round(erased.size_bytes / 1000, DIGITS)
        made.append(row)
    return made
