"""Run the sweeps of this folder, which the figures of docs come from, and make the rows of their tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from erasure.assets.build.measured import DIGITS, Row, figure
from erasure.errors import EvaluationError
from erasure.eval.results import FILE, Results
from erasure.eval.rows import Record
from erasure.eval.sweeps.means import check_alike, cost_of, means_of, observed_in, table_of
from erasure.eval.sweeps.plan import Cell, Method, SweepPlan
from erasure.eval.sweeps.runner import ERASURE, CellOutcome, sweep

RATES = ("UA", "IRA", "CRA", "AA")
"""Columns of the tables."""
METRICS = (*RATES, "IRA_group", "drift")
"""Metrics of the rows, as far as a suite has them."""
UNSEEN = "canvas-unseen"
UA_UNSEEN = f"UA_{UNSEEN}"
"""UA of phrasings that nothing was trained on, in rows of several suites."""


def plan(name: str, size: str | None = None) -> SweepPlan:
    """A sweep of this folder.

    Args:
        name: Of its file, without the ending.
        size: In the place of the file's.
    """
    return SweepPlan.read(Path(__file__).with_name(f"{name}.toml"), size=size)


def measure(chosen: SweepPlan, out: Path, share: tuple[int, int]) -> None:
    """Make and measure what is left of a sweep, and print what became of each cell.

    Raises:
        SystemExit: A cell failed.
    """
    failed = [one for one in sweep(chosen, out=out, share=share, tell=_tell) if one.state == "failed"]
    if failed:
        raise SystemExit(f"{len(failed)} cells failed; the first: {failed[0].cell}: {'; '.join(failed[0].reasons)}")


def _tell(outcome: CellOutcome, ended: int, count: int) -> None:
    print(f"[{ended}/{count}] {outcome.cell}: {outcome.state}", *outcome.reasons, sep="\n  ", flush=True)


def erasure_of(made: Path, strategy: str, concept: str, model: str = "canvas-sd") -> Path:
    """Folder of the erasure that a sweep of this folder makes with a strategy as it comes.

    Args:
        made: Folder of the step.
        strategy: Its name.
        concept: What is erased.
        model: From which.
    """
    return made / Cell(model, Method(strategy, strategy), concept, 0).folder / ERASURE


def rows(chosen: SweepPlan, out: Path) -> list[Row]:
    """Means over concepts: a row for each method, model and group of concepts, with the figures of all suites.

    The figures of every suite but the first have its name behind theirs (`UA_canvas-unseen`). Where cells have no
    results, every rate says why.

    Args:
        chosen: The sweep.
        out: Where its results are.
    """
    made: dict[tuple[str, str, str], Row] = {}
    order = {method.label: number for number, method in enumerate(chosen.methods)}
    means = [row for row in table_of(chosen, out).rows if row["variant"] == "after"]
    for mean in sorted(means, key=lambda each: order[each["name"]]):
        group = mean["concept"].rpartition(": ")[0] if chosen.groups else mean["concept"]
        count = len(chosen.groups.get(group, chosen.concepts))
        row = made.setdefault(
            (mean["name"], mean["model"], group),
            {"method": mean["name"], "model": mean["model"], "size": mean["size"], "group": group, "concepts": count},
        )
        suite = "" if mean["suite"] == chosen.measures[0].label else mean["suite"]
        row |= {**figures_of(mean, suite), **row}
    return list(made.values())


def figures_of(mean: Mapping[str, Record], suite: str = "") -> Row:
    """Figures of one row of means, the seconds that an erasure took, and its kB.

    Args:
        mean: The row.
        suite: What stands behind the names of metrics.
    """
    reasons = mean["missing"]
    if set(reasons) == {"results"}:
        reasons = dict.fromkeys(RATES, reasons["results"])
    made: Row = {name: figure(mean["cells"][name]) for name in METRICS if name in mean["cells"]}
    made |= {name: figure({"reason": reasons[name]}) for name in METRICS if name in reasons}
    if suite:
        made = {f"{name}_{suite}": cell for name, cell in made.items()}
    if "seconds" in mean:
        seconds, size = float(mean["seconds"]), float(mean["size_bytes"])  # type: ignore[arg-type]
        made |= {"seconds": round(seconds, DIGITS), "kB": round(size / 1000, DIGITS)}
    return made


def rows_of_folders(
    out: Path, concepts: Sequence[str], methods: Iterable[str] = (), models: Iterable[str] = ()
) -> list[Row]:
    """The same rows, of evaluations that no sweep made: `MODEL/CONCEPT-METHOD/results.json`, with one erasure each.

    A method that lacks the results of a concept on a model has no row there, which is printed.

    Args:
        out: Folder of the folders of models.
        concepts: What every mean is over.
        methods: Which have rows; all that there are when empty.
        models: On which.

    Raises:
        EvaluationError: A folder holds results of something else, results of one method were measured in unlike ways,
            or there is nothing.
    """
    made: list[Row] = []
    wanted, on = list(methods), list(models)
    found = sorted(file.parent for file in out.glob(f"*/*/{FILE}"))
    cells = [(folder.parent.name, *folder.name.partition("-")[::2]) for folder in found]
    for method in wanted or dict.fromkeys(method for _, _, method in cells):
        for model in on or dict.fromkeys(model for model, _, _ in cells):
            have = [concept for concept in concepts if (model, concept, method) in cells]
            if absent := [concept for concept in concepts if concept not in have]:
                if have or (wanted and on):
                    print(f"{method} on {model} has no row: no results of {', '.join(absent)}", flush=True)
                continue
            made.append(_mean_of_folders(out, model, method, concepts))
    if not made:
        raise EvaluationError(
            f"{out} has results of all of {', '.join(concepts)} for no method: give a folder of folders "
            f"MODEL/CONCEPT-METHOD with a {FILE} each"
        )
    return made


def _checked(folder: Path, model: str, concept: str, method: str) -> Results:
    """Results that are of what their folder says.

    Raises:
        EvaluationError: They are not.
    """
    results = Results.load(folder)
    erased = [(each.get("strategy"), list(each.get("concepts") or ())) for each in results.erasures]
    if results.suite != "canvas" or results.model.get("name") != model or erased != [(method, [concept])]:
        raise EvaluationError(
            f"{folder} holds results of suite {results.suite} on {results.model.get('name')} with {erased}, expected "
            f"those of suite canvas on {model} with {method} of {concept} alone"
        )
    return results


def _mean_of_folders(out: Path, model: str, method: str, concepts: Sequence[str]) -> Row:
    """The row of a method on a model."""
    results = {concept: _checked(out / model / f"{concept}-{method}", model, concept, method) for concept in concepts}
    check_alike(f"{method} on {model}", (((), concept, one) for concept, one in results.items()))
    means, missing = means_of(observed_in(results.items()).get("after", {}), len(results))
    size = next(iter(results.values())).size
    about: Row = {"method": method, "model": model, "size": size, "group": "all", "concepts": len(results)}
    mean = {"cells": means, "missing": missing, **cost_of(list(results.values()))}
    return about | figures_of(mean)


def chosen_cells(found: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Rows with these cells alone, in this order, as far as they have them."""
    return [{name: row[name] for name in names if name in row} for row in found]
