"""`results.json`: one row per metric."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from erasure.errors import EvaluationError, ResultsFolderError
from erasure.eval.rows import Record
from erasure.eval.schemas import ResultsFile
from erasure.files import read_json, validated, write_json
from erasure.versions import library_versions

SCHEMA_VERSION = 1
FILE = "results.json"
OTHERS = ("numpy", "pillow", "open_clip_torch", "torchmetrics")
"""Libraries that numbers depend on, besides those that erasures do."""


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
    date: str | None = None
    """When it was finished, in UTC, as `2026-01-31T12:00:00+00:00`; results of earlier versions have none."""
    versions: Record = field(default_factory=dict)
    """Libraries that it was measured with."""
    detectors: list[Record] = field(default_factory=list)
    """Detectors that looked at the images: `label`, `recipe`, `self_test`, and `controls`, their sensitivity and
    specificity on pictures of the user's, or `None` where these were not measured."""
    folder: Path | None = field(default=None, compare=False)
    """Where the samples and images are."""

    @classmethod
    def now(cls, **fields: Any) -> Results:
        """Results that were finished just now, with the libraries of this process."""
        versions = library_versions(OTHERS) | {"python": platform.python_version()}
        return cls(**fields, date=datetime.now(UTC).isoformat(timespec="seconds"), versions=versions)

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
            "date": self.date,
            "versions": self.versions,
            **({"detectors": self.detectors} if self.detectors else {}),
        }

    def save(self, folder: str | Path) -> Path:
        """Write `results.json`, atomically.

        Raises:
            EvaluationError: It cannot be written.
        """
        return write_json(Path(folder) / FILE, self.to_dict(), error=ResultsFolderError)

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
        schema = data.get("schema_version")
        if isinstance(schema, int) and schema > SCHEMA_VERSION:
            raise EvaluationError(
                f"{path} has schema version {schema}, this package reads up to {SCHEMA_VERSION}: upgrade"
            )
        known: Record = validated(data, ResultsFile, str(path), error=EvaluationError)
        return cls(**{key: value for key, value in known.items() if key != "schema_version"}, folder=path.parent)
