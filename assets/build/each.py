"""Figures of every concept that a sweep measured, which several runs may measure bit by bit, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from erasure.assets.build.measured import DIGITS, Figure, Row, figure
from erasure.assets.build.sweep import METRICS, UA_UNSEEN, UNSEEN, chosen_cells, figures_of
from erasure.assets.world import OBJECTS
from erasure.eval.results import Results
from erasure.eval.statistics import wilson
from erasure.eval.sweeps.means import MeasuredRow, check_alike, cost_of, means_of, observed_in
from erasure.eval.sweeps.plan import SweepPlan
from erasure.eval.sweeps.runner import check_folder, outcome_of
from erasure.eval.table import SAMPLES, read_rows

COST = ("seconds", "kB")
OWN_STYLE = "own_style"
"""Share of the images of an erased object that are in the style that their prompt names."""
COLUMNS = (*METRICS, UA_UNSEEN, OWN_STYLE, *COST)
"""Figures of a row, as far as there are."""


def rows(chosen: SweepPlan, out: Path) -> list[Row]:
    """A row for each method and concept that is measured to its end, with the figures of all suites.

    Concepts are in the order of the sweep's groups.

    Args:
        chosen: The sweep, of one model and seed.
        out: Where its results are.

    Raises:
        EvaluationError: The folder holds another sweep, or results were measured in unlike ways.
    """
    check_folder(chosen, out)
    done = [cell for cell in chosen.cells if outcome_of(chosen, out, cell).state == "done"]
    methods = [method.label for method in chosen.methods]
    concepts = list(dict.fromkeys(chain(*chosen.groups.values(), chosen.concepts)))
    made: list[Row] = [{"method": cell.method.label, "concept": cell.concept} for cell in done]
    for measure in chosen.measures:
        found = [Results.load(out / cell.folder / measure.folder) for cell in done]
        check_alike(measure.label, (((), str(cell), each) for cell, each in zip(done, found, strict=True)))
        suite = "" if measure is chosen.measures[0] else measure.label
        for row, results in zip(made, found, strict=True):
            observed = observed_in([(str(row["concept"]), results)])["after"]
            cells = {name: first.row for name, (first, *_) in observed.items()}
            row |= {**figures_of({"cells": cells, "missing": {}, **cost_of([results])}, suite), **row}
    for row, cell in zip(made, done, strict=True):
        if cell.concept in OBJECTS:
            row[OWN_STYLE] = own_style(out / cell.folder / chosen.measures[0].folder)
    return sorted(
        chosen_cells(made, ("method", "concept", *COLUMNS)),
        key=lambda row: (methods.index(str(row["method"])), concepts.index(str(row["concept"]))),
    )


def own_style(folder: Path) -> Figure:
    """Measure the share of images of an erased object that are in the style of their prompt, with Wilson's interval.

    Args:
        folder: Of the evaluation.
    """
    kept = [
        sample["judged"]["style"] == sample["style"]
        for sample in read_rows(folder / f"{SAMPLES}.jsonl")
        if (sample["variant"], sample["role"]) == ("after", "target") and sample.get("style") and sample.get("judged")
    ]
    if not kept:
        return figure({"reason": "no image of an erased object was judged"})
    return figure(wilson(sum(kept), len(kept)), len(kept))


def means(found: Sequence[Row], groups: Mapping[str, Sequence[str]]) -> list[Row]:
    """Means over the concepts of each group that every method was measured on, so that rows compare.

    Args:
        found: Rows of `rows`.
        groups: Concepts by the name of the group that a mean is of.
    """
    methods = dict.fromkeys(str(row["method"]) for row in found)
    known = {(str(row["method"]), str(row["concept"])): row for row in found}
    made: list[Row] = []
    for group, concepts in groups.items():
        common = [concept for concept in concepts if all((method, concept) in known for method in methods)]
        if left := [concept for concept in concepts if concept not in common]:
            print(f"no mean of {group} has {', '.join(left)}: not measured with every method", flush=True)
        for method in methods if common else ():
            own = [known[method, concept] for concept in common]
            made.append({"method": method, "group": group, "concepts": len(common), **_mean(own)})
    return sorted(made, key=lambda row: list(methods).index(str(row["method"])))


def _mean(of: Sequence[Row]) -> Row:
    """Means of the figures of some concepts, with intervals over concepts and images; seconds and kB."""
    cost = {name: sum(row[name] for row in of) / len(of) for name in COST}  # type: ignore[misc]
    made: Row = {}
    for suite, names in (("", METRICS), (UNSEEN, (UA_UNSEEN,))):
        observed: dict[str, list[MeasuredRow]] = {}
        for row in of:
            for name in names:
                if isinstance(cell := row.get(name), dict):
                    plain = name.removesuffix(f"_{suite}")
                    known = {"low": None, "high": None, "n": 0, **cell, "name": plain, "recipe": {}}
                    observed.setdefault(plain, []).append(MeasuredRow(str(row["concept"]), known))
        cells, missing = means_of(observed, len(of))
        made |= figures_of({"cells": cells, "missing": missing}, suite)
    styles = [cell for row in of if isinstance(cell := row.get(OWN_STYLE), dict)]
    if images := sum(cell.get("n", 0) for cell in styles):
        kept = sum((cell["value"] or 0) * cell.get("n", 0) for cell in styles)
        made[OWN_STYLE] = figure(wilson(min(kept, images), images), images)
    return made | {name: round(value, DIGITS) for name, value in cost.items()}
