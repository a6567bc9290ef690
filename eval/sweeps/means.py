"""Means of a sweep over concepts and seeds, with intervals; no score of several numbers together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erasure.errors import EvaluationError
from erasure.eval.comparison import BASE, Comparison
from erasure.eval.metrics import facts_of
from erasure.eval.metrics.unlearncanvas import average_interval
from erasure.eval.results import FILE, Results
from erasure.eval.rows import Record, Row, is_figure
from erasure.eval.statistics import Interval, cluster_bootstrap, wilson
from erasure.eval.sweeps.plan import Cell, Measure, SweepPlan
from erasure.eval.sweeps.runner import check_folder, outcome_of
from erasure.files import differences

RATES = ("UA", "IRA", "CRA")
AVERAGE = "AA"
"""Mean of the rates, whose interval follows from theirs."""
Figure = tuple[str, str]
"""Variant and name of a metric."""


class MeasuredRow(NamedTuple):
    """A metric row of one cell."""

    concept: str
    row: Row


def table_of(plan: SweepPlan, folder: str | Path) -> Comparison:
    """A row for each model, method and group of concepts, with the mean of every metric over concepts and seeds.

    Intervals are of 95 %. Those of rates are the outer bounds of a bootstrap that draws concepts and of Wilson's
    interval over all their images, because a bootstrap has no width where nothing fails; those of other metrics of
    the bootstrap and of the mean bounds of the cells' own intervals. A metric that one cell has no value of has no
    mean: it would be one of other concepts than the mean beside it.

    Args:
        plan: The sweep.
        folder: Where `sweep` left its results.

    Raises:
        EvaluationError: The folder holds another sweep, or results are damaged or were measured in unlike ways.
    """
    folder = Path(folder)
    check_folder(plan, folder)
    groups = plan.groups or {_all(plan.concepts): plan.concepts}
    rows: list[Record] = []
    found = {str(cell.folder): _results(plan, folder, cell) for cell in plan.cells}
    for measure in plan.measures:
        _check_alike(plan, measure, found)
        for model in plan.models:
            for name, members in groups.items():
                base_given = False
                for method in plan.methods:
                    cells = [Cell(model, method, concept, seed) for concept in members for seed in plan.seeds]
                    results = [found[str(cell.folder)].get(measure.folder) for cell in cells]
                    # What the stock model draws does not depend on the method.
                    with_base = not base_given and None not in results
                    base_given |= with_base
                    made = _rows(plan, folder, measure, cells, results, with_base)
                    about = name if not plan.groups else f"{name}: {len(members)}"
                    rows += [row | {"concept": about, "model": model} for row in made]
    columns = dict.fromkeys(name for row in rows for name in (*row["cells"], *row["missing"]))
    return Comparison(tuple(columns), tuple(rows))


def _all(concepts: Sequence[str]) -> str:
    return concepts[0] if len(concepts) == 1 else f"mean of {len(concepts)}"


def _results(plan: SweepPlan, folder: Path, cell: Cell) -> dict[str, Results]:
    """Finished results of a cell by the folder of the measurement."""
    return {
        measure.folder: Results.load(folder / cell.folder / measure.folder)
        for measure in plan.measures
        if (folder / cell.folder / measure.folder / FILE).is_file()
    }


def _check_alike(plan: SweepPlan, measure: Measure, found: Mapping[str, Mapping[str, Results]]) -> None:
    check_alike(
        measure.label,
        (
            ((cell.model, cell.seed), str(cell), results)
            for cell in plan.cells
            if (results := found[str(cell.folder)].get(measure.folder)) is not None
        ),
    )


def check_alike(what: str, given: Iterable[tuple[tuple[object, ...], str, Results]]) -> None:
    """Refuse a mean of numbers that were measured in unlike ways, for instance by versions of two machines.

    Args:
        what: Name of the suite or attack.
        given: Results, each with what may tell its recipes from those of others (such as the model), and its name.

    Raises:
        EvaluationError: One metric was measured in two ways. The message says what differs, and where.
    """
    recipes: dict[tuple[object, ...], tuple[object, str]] = {}
    for apart, name, results in given:
        for row in filter(is_figure, results.metrics):
            key = (apart, str(row.get("variant", "after")), str(row["name"]))
            known, first = recipes.setdefault(key, (row["recipe"], name))
            if changed := differences(known, row["recipe"]):
                raise EvaluationError(
                    f"{row['name']} of {what} was measured differently for {first} and for {name}: "
                    f"{'; '.join(changed[:5])}. Delete the folder of one of them, and run the sweep again"
                )


def observed_in(results: Iterable[tuple[str, Results]]) -> dict[str, dict[str, list[MeasuredRow]]]:
    """Rows of metrics by variant and name.

    Args:
        results: Results with the concept of each.
    """
    figures: dict[str, dict[str, list[MeasuredRow]]] = {}
    for concept, one in results:
        for figure in filter(is_figure, one.metrics):
            sides = figures.setdefault(str(figure.get("variant", "after")), {})
            sides.setdefault(str(figure["name"]), []).append(MeasuredRow(concept, figure))
    return figures


def cost_of(results: Sequence[Results]) -> Record:
    """Mean `seconds` that the erasures took to make, and mean `size_bytes`."""
    return {
        key: sum(sum(each.get(key) or 0 for each in one.erasures) for one in results) / len(results)
        for key in ("seconds", "size_bytes")
    }


def _rows(
    plan: SweepPlan, folder: Path, measure: Measure, cells: Sequence[Cell], results: Sequence[Results | None],
    with_base: bool,
) -> Iterator[Record]:  # fmt: skip
    """Rows of one method: of the stock model if asked for, of the erased one, and of every other variant."""
    method, model = cells[0].method, cells[0].model
    several = f" on {model}" if len(plan.models) > 1 else ""
    figures = observed_in((cell.concept, one) for cell, one in zip(cells, results, strict=True) if one is not None)
    absent = [cell for cell, one in zip(cells, results, strict=True) if one is None]
    known = [one for one in results if one is not None]
    suite = measure.label if measure.kind != "stress" else f"stress {measure.label}"
    for variant in figures or {"after": {}}:
        if variant == "before" and not with_base:
            continue
        label = {"before": BASE, "after": method.label}.get(variant, f"{method.label}: {variant}") + several
        row: Record = {
            "label": label, "name": method.label, "method": f"{label} {cells[0].concept}", "suite": suite,
            "size": measure.size, "variant": variant, "cells": {}, "missing": {},
        }  # fmt: skip
        if absent:
            why = _why(plan, folder, measure, absent)
            row["missing"] = dict.fromkeys(figures.get(variant, {}) or ["results"], why)
        else:
            means, missing = means_of(figures.get(variant, {}), len(cells))
            row |= {"cells": means, "missing": missing}
        if variant == "after" and known:
            row |= cost_of(known)
        yield row


def _why(plan: SweepPlan, folder: Path, measure: Measure, absent: Sequence[Cell]) -> str:
    """Why cells have no results."""
    outcome = outcome_of(plan, folder, absent[0])
    told = [part for part in outcome.parts if part.state != "done" and part.what in ("erasure", measure.folder)]
    first = f"{told[0].state}: {told[0].reason}" if told else "not measured yet"
    others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
    return f"{first} ({absent[0]}{others})"


def means_of(observed: Mapping[str, Sequence[MeasuredRow]], cells: int) -> tuple[dict[str, Record], dict[str, str]]:
    """Means with intervals of the metrics that every cell has a value of, and why there is none of the others.

    Args:
        observed: What was found by metric.
        cells: How many cells there are.
    """
    means: dict[str, Record] = {}
    missing: dict[str, str] = {}
    for name, found in observed.items():
        without = [each for each in found if each.row["value"] is None]
        if without or len(found) < cells:
            why = str(without[0].row.get("reason") or "no reason given") if without else "a cell does not have it"
            missing[name] = f"{len(without) or cells - len(found)} of {cells} have no value: {why}"
            continue
        spread = _pooled(name, found, observed)
        means[name] = _mean(found, spread)
    return means, missing


def _mean(found: Sequence[MeasuredRow], pooled: Interval | None) -> Record:
    """Mean, interval, images, how many of them have no outcome, and concepts."""
    values = np.asarray([float(each.row["value"]) for each in found])
    concepts = [each.concept for each in found]
    low: float | None = None
    high: float | None = None
    if len(found) == 1:
        low, high = found[0].row["low"], found[0].row["high"]
    if len(set(concepts)) > 1:
        drawn = cluster_bootstrap(partial(mean_at, values), concepts)
        low, high = drawn.low, drawn.high
    if pooled is None and len(found) > 1 and all(each.row["low"] is not None for each in found):
        # Of what is no rate: as wide as the cells' own intervals are on average, where the concepts do not differ.
        pooled = Interval(0.0, *(float(np.mean([each.row[side] for each in found])) for side in ("low", "high")))
    if pooled is not None:
        low = pooled.low if low is None else min(low, pooled.low)
        high = pooled.high if high is None else max(high, pooled.high)
    return {
        "value": float(values.mean()), "low": low, "high": high, "n": sum(int(each.row["n"]) for each in found),
        "missing": sum(int(each.row.get("missing") or 0) for each in found), "concepts": len(set(concepts)),
        "cells": len(found),
    }  # fmt: skip


def _pooled(name: str, found: Sequence[MeasuredRow], observed: Mapping[str, Sequence[MeasuredRow]]) -> Interval | None:
    """Interval over all images of all cells; `None` of what is no rate."""
    if name == AVERAGE:
        rates = [observed.get(rate, ()) for rate in RATES]
        if not all(rates) or any(each.row["value"] is None for rate in rates for each in rate):
            return None
        return average_interval(*(_wilson(rate) for rate in rates))
    return _wilson(found) if facts_of(found[0].row).attributes["unit"] == "%" else None


def _wilson(found: Sequence[MeasuredRow]) -> Interval:
    images = sum(int(each.row["n"]) for each in found)
    mean = float(np.mean([float(each.row["value"]) for each in found]))
    return wilson(min(max(mean, 0.0), 1.0) * images, images)


def mean_at(values: np.ndarray, index: np.ndarray) -> float:
    """Mean of some values, as a bootstrap asks for it."""
    return float(values[index].mean())
