"""`results.json`: one row per metric, and tables of several of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from erasure.errors import EvaluationError
from erasure.eval.rows import Record
from erasure.eval.schemas import ResultsFile
from erasure.files import differences, read_json, validated, write_json

SCHEMA_VERSION = 1
FILE = "results.json"


@dataclass
class Results:
    """What an evaluation found."""

    suite: str
    size: str
    model: Record
    """`name`, `fingerprint`, `dtype`."""
    erasures: list[Record]
    """One entry per erasure that was attached: `name`, `strategy`, `concepts`, `strength`, `size_bytes`, `seconds`."""
    metrics: list[Record]
    """Rows with `name`, `concept`, `variant` (`before`, `after`, or a way to draw), `value`, `low`, `high`, `n`,
    `recipe`; a value is `None` when it could not be had, with a `reason`."""
    cost: Record
    """Seconds, images, peak memory, artifact size."""
    folder: Path | None = field(default=None, compare=False)
    """Where the samples and images are."""

    def get(self, name: str, variant: str = "after", concept: str | None = None) -> Record:
        """The first row of a metric.

        Raises:
            EvaluationError: There is none.
        """
        for row in self.metrics:
            if row["name"] == name and row.get("variant", variant) == variant and concept in (None, row["concept"]):
                return row
        names = ", ".join(sorted({row["name"] for row in self.metrics}))
        raise EvaluationError(f"no metric {name!r} ({variant}) in these results; there are: {names}")

    def to_dict(self) -> Record:
        """Plain data in the stable schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "suite": self.suite,
            "size": self.size,
            "model": self.model,
            "erasures": self.erasures,
            "metrics": self.metrics,
            "cost": self.cost,
        }

    def save(self, folder: str | Path) -> Path:
        """Write `results.json`, atomically.

        Raises:
            EvaluationError: It cannot be written.
        """
        return write_json(Path(folder) / FILE, self.to_dict(), error=EvaluationError)

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a `results.json`, or the one in a folder.

        Raises:
            EvaluationError: It is missing, damaged, incomplete, of a newer schema, or something else.
        """
        # Unlike those of `Path`, these give no error for names that cannot be.
        path = Path(path) / FILE if os.path.isdir(path) else Path(path)
        if not os.path.lexists(path):
            raise EvaluationError(f"no results at {path}: run an evaluation first, or give its folder")
        data: dict[str, JsonValue] = read_json(path, dict[str, JsonValue], error=EvaluationError)
        version = data.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise EvaluationError(
                f"{path} has schema version {version}, this package reads up to {SCHEMA_VERSION}: upgrade"
            )
        known: Record = validated(data, ResultsFile, str(path), error=EvaluationError)
        return cls(**{key: value for key, value in known.items() if key != "schema_version"}, folder=path.parent)


@dataclass(frozen=True)
class Comparison:
    """Several results side by side."""

    columns: tuple[str, ...]
    """Metric names."""
    rows: tuple[Record, ...]
    """`label`, `variant`, `concept`, `model`, `cells` (metric name -> value, low, high, n; missing ones left out),
    `seconds` (of making the erasures) and `size_bytes`."""

    def to_dict(self) -> Record:
        """Plain data."""
        return {"columns": list(self.columns), "rows": list(self.rows)}

    def means(self) -> list[Record]:
        """Per label and variant: the plain mean of every column over its concepts, and how many there are."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for row in self.rows:
            groups.setdefault((row["label"], row["variant"]), []).append(row)
        table = []
        for (label, variant), rows in groups.items():
            cells = {}
            for column in self.columns:
                values = [row["cells"][column]["value"] for row in rows if column in row["cells"]]
                if values:
                    cells[column] = sum(values) / len(values)
            table.append({"label": label, "variant": variant, "concepts": len(rows), "cells": cells})
        return table


def label(results: Results) -> str:
    """Strategies of the attached erasures, with a strength that is not 1; `base` without any."""
    parts = []
    for erasure in results.erasures:
        strength = erasure.get("strength", 1.0)
        part = str(erasure.get("strategy") or erasure.get("name"))
        parts.append(part if strength == 1 else f"{part} x{strength:g}")
    return " + ".join(dict.fromkeys(parts)) or "base"


def compare(results: Sequence[Results | str | Path]) -> Comparison:
    """Put results side by side, one row per result, concept and variant.

    Equal rows of the base model (several methods measured against one baseline) appear once.

    Args:
        results: Results, or paths to them.

    Raises:
        EvaluationError: A metric was computed by different recipes; the message says which field differs and where.
    """
    loaded = [item if isinstance(item, Results) else Results.load(item) for item in results]
    if not loaded:
        raise EvaluationError("nothing to compare: give at least one results.json")
    recipes: dict[str, tuple[JsonValue, str]] = {}
    rows: dict[str, Record] = {}
    columns: dict[str, None] = {}
    for index, result in enumerate(loaded):
        where = str(result.folder or f"result {index + 1}")
        for metric in result.metrics:
            name = metric["name"]
            known, first = recipes.setdefault(name, (metric["recipe"], where))
            changed = differences(known, metric["recipe"])
            if changed:
                raise EvaluationError(
                    f"{name} was measured differently in {first} and {where}: {'; '.join(changed)}. "
                    "Measure both the same way, or compare them apart"
                )
            columns.setdefault(name)
            variant: str = metric.get("variant", "after")
            who = {"after": label(result), "before": "base"}.get(variant, variant)
            # Rows of the base model do not depend on which erasure was attached.
            owner = str(result.model.get("fingerprint")) if variant == "before" else str(index)
            key = json.dumps([variant, owner, metric["concept"]])
            row = rows.setdefault(key, _row(result, who, variant, metric["concept"]))
            if metric["value"] is not None:
                row["cells"].setdefault(name, {k: metric.get(k) for k in ("value", "low", "high", "n")})
    return Comparison(tuple(columns), tuple(rows.values()))


def _row(result: Results, who: str, variant: str, concept: str | None) -> Record:
    row: Record = {
        "label": who,
        "variant": variant,
        "concept": concept,
        "model": result.model.get("name"),
        "cells": {},
    }
    if variant == "after":
        for key in ("seconds", "size_bytes"):
            row[key] = sum(erasure.get(key) or 0 for erasure in result.erasures)
    return row
