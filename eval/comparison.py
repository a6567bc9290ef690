"""Several results side by side: every run by a name of its own, means over distinct concepts only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from erasure.errors import EvaluationError
from erasure.eval.results import Results
from erasure.eval.rows import Record, is_figure
from erasure.files import differences, shown

BASE = "base"
"""Label of the stock model."""


@dataclass(frozen=True)
class Comparison:
    """Several results side by side."""

    columns: tuple[str, ...]
    """Metric names."""
    rows: tuple[Record, ...]
    """`label`, `method`, `suite`, `size`, `variant`, `concept`, `model`, `cells` (metric name -> value, low, high, n),
    `missing` (metric name -> why it has no value), `seconds` (of making the erasures) and `size_bytes`."""

    def to_dict(self) -> Record:
        """Convert to plain data."""
        return {"columns": list(self.columns), "rows": list(self.rows)}

    def suites(self) -> list[Comparison]:
        """Split into one comparison for each suite or attack."""
        parts = []
        for suite in dict.fromkeys((row["suite"], row["size"]) for row in self.rows):
            rows = tuple(row for row in self.rows if (row["suite"], row["size"]) == suite)
            columns = tuple(
                column for column in self.columns if any(column in row["cells"] | row["missing"] for row in rows)
            )
            parts.append(Comparison(columns, rows))
        return parts

    def means(self) -> list[Record]:
        """Compute, per method, suite and variant, the mean of every column over concepts, and their number.

        There is none for a single concept, and none where a concept was measured more than once: those are runs, not
        concepts. `repeated` says which ones have no mean for that reason.
        """
        table = []
        for rows in self._groups():
            concepts = [row["concept"] for row in rows]
            if len(set(concepts)) < len(concepts) or len(concepts) < 2 or None in concepts:
                continue
            cells = {}
            for column in self.columns:
                values = [row["cells"][column]["value"] for row in rows if column in row["cells"]]
                # A mean over some of the concepts would be one over others than beside it.
                if len(values) == len(rows):
                    cells[column] = sum(values) / len(values)
            first = {key: rows[0][key] for key in ("suite", "size", "variant")}
            table.append({"label": rows[0]["method"], **first, "concepts": len(rows), "cells": cells})
        return table

    def repeated(self) -> list[str]:
        """List the methods without a mean, because one of several concepts was measured more than once."""
        found = []
        for rows in self._groups():
            concepts = [row["concept"] for row in rows]
            if 1 < len(set(concepts)) < len(concepts):
                found.append(f"{rows[0]['method']} ({rows[0]['suite']})")
        return list(dict.fromkeys(found))

    def _groups(self) -> list[list[Record]]:
        groups: dict[tuple[str, ...], list[Record]] = {}
        for row in self.rows:
            groups.setdefault((row["method"], row["suite"], row["size"], row["variant"]), []).append(row)
        return list(groups.values())


def label(results: Results) -> str:
    """Name the strategies of the attached erasures, with strengths other than 1; `base` without any."""
    parts = []
    for erasure in results.erasures:
        strength = erasure.get("strength", 1.0)
        part = str(erasure.get("strategy") or erasure.get("name"))
        parts.append(part if strength == 1 else f"{part} x{strength:g}")
    return " + ".join(dict.fromkeys(parts)) or BASE


def compare(results: Sequence[Results | str | Path], labels: Sequence[str] = ()) -> Comparison:
    """Put results side by side, one row per result, concept and variant.

    Equal rows of the base model (several methods measured against one baseline) appear once.

    Args:
        results: Results, or paths to them.
        labels: What each is called; the name of its folder when left out. Results with one label are runs of one
            method on different concepts, over which there is a mean. Without labels, those with the same strategies,
            options and strengths are.

    Raises:
        EvaluationError: A metric was computed by different recipes (the message says which field differs and where);
            as many labels as results are needed; or one label stands for two results of one concept.
    """
    loaded = [item if isinstance(item, Results) else Results.load(item) for item in results]
    if not loaded:
        raise EvaluationError("nothing to compare: give at least one results.json")
    if labels and len(labels) != len(loaded):
        raise EvaluationError(f"{len(labels)} labels for {len(loaded)} results: give one for each, or none")
    names = list(labels) or _names(loaded)
    methods = list(labels) or _methods(loaded)
    recipes: dict[tuple[str, str], tuple[JsonValue, str]] = {}
    rows: dict[str, Record] = {}
    columns: dict[str, None] = {}
    for index, result in enumerate(loaded):
        where = str(result.folder or f"result {index + 1}")
        for metric in filter(is_figure, result.metrics):
            name = metric["name"]
            known, first = recipes.setdefault((result.suite, name), (metric["recipe"], where))
            if changed := differences(known, metric["recipe"]):
                raise EvaluationError(
                    f"{name} was measured differently in {first} and {where}: {'; '.join(changed)}. "
                    "Measure both the same way, or compare them apart"
                )
            columns.setdefault(name)
            variant: str = metric.get("variant", "after")
            # Rows of the base model do not depend on which erasure was attached.
            owner = str(result.model.get("fingerprint")) if variant == "before" else str(index)
            key = json.dumps([result.suite, result.size, variant, owner, metric["concept"]])
            if key not in rows:
                rows[key] = _row(result, variant, metric["concept"])
                rows[key] |= _called(result, names[index], methods[index], variant, loaded)
            if metric["value"] is not None:
                rows[key]["cells"].setdefault(name, {k: metric.get(k) for k in ("value", "low", "high", "n")})
            else:
                rows[key]["missing"].setdefault(name, str(metric.get("reason") or "no reason given"))
    _check_labels(list(rows.values()), bool(labels))
    return Comparison(tuple(columns), tuple(rows.values()))


def _called(result: Results, name: str, method: str, variant: str, loaded: Sequence[Results]) -> Record:
    """Give the label and the method of a row."""
    if variant == "before":
        models = {other.model.get("fingerprint"): other.model.get("name") for other in loaded}
        which = BASE if len(models) == 1 else f"{BASE} {result.model.get('name')} {result.model.get('fingerprint')}"
        return {"label": which, "method": which}
    if variant == "after":
        return {"label": name, "method": method}
    alone = sum(other.suite == result.suite for other in loaded) == 1
    return {"label": variant if alone else f"{name}: {variant}", "method": f"{method}: {variant}"}


def _names(loaded: Sequence[Results]) -> list[str]:
    """Make unique names of results: from the end of the folder's path, as short as possible, or the strategies."""
    paths = [result.folder.resolve().parts if result.folder else (label(result),) for result in loaded]
    names = [""] * len(paths)
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    # What is given twice, and results that were never in a folder, are counted.
    seen: Counter[str] = Counter()
    for index, (result, name) in enumerate(zip(loaded, names, strict=True)):
        concepts = sorted({str(metric["concept"]) for metric in result.metrics})
        key = json.dumps([name, result.suite, result.size, concepts])
        seen[key] += 1
        if seen[key] > 1:
            names[index] = f"{name} #{seen[key]}"
    return names


def _methods(loaded: Sequence[Results]) -> list[str]:
    """Name what was done to the model, the same for every concept: strategies, options and strengths."""
    labels = [label(result) for result in loaded]
    keys = [
        json.dumps([[e.get("strategy"), e.get("options"), e.get("strength", 1.0)] for e in result.erasures])
        for result in loaded
    ]
    methods = []
    for said, key in zip(labels, keys, strict=True):
        alike = list(dict.fromkeys(k for k, other in zip(keys, labels, strict=True) if other == said))
        methods.append(said if len(alike) == 1 else f"{said}, options {alike.index(key) + 1}")
    return methods


def _check_labels(rows: Sequence[Record], given: bool) -> None:
    """Refuse one given label for two results of the same concept, because their rows could not be distinguished."""
    seen: set[str] = set()
    for row in rows:
        key = json.dumps([row[k] for k in ("label", "suite", "size", "variant", "concept", "model")])
        if key in seen and given and row["variant"] != "before":
            raise EvaluationError(
                f"two results of {shown(row['concept'])} are both labelled {shown(row['label'])}: give each run a "
                "label of its own; only runs on different concepts may share one"
            )
        seen.add(key)


def _row(result: Results, variant: str, concept: str | None) -> Record:
    row: Record = {
        "suite": result.suite,
        "size": result.size,
        "variant": variant,
        "concept": concept,
        "model": result.model.get("name"),
        "cells": {},
        "missing": {},
    }
    if variant == "after":
        for key in ("seconds", "size_bytes"):
            row[key] = sum(erasure.get(key) or 0 for erasure in result.erasures)
    return row
