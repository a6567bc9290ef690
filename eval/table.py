"""The sample table on disk: append-only JSON lines that survive a kill, in parts when several processes write."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erasure.cache import differences
from erasure.errors import EvaluationError
from erasure.eval.results import write_atomically

RECIPE = "recipe.json"
SAMPLES = "samples"
FEATURES = "features"
BEFORE_AFTER = ("before", "after")
"""Variants of a suite that measures erasures."""
Key = tuple[str, str]
"""Sample id and variant."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; an unfinished last line is cut off the file.

    Raises:
        EvaluationError: A line before the last is damaged.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        # Cut it off on disk as well, or the next row would be glued to it.
        write_atomically(path, whole)
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"{path}, line {number} is damaged ({error}): delete the line to redo its sample"
            ) from error
    return rows


def encode_vector(vector: np.ndarray) -> str:
    """A vector as base64 of little-endian float32."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def decode_vector(text: str) -> np.ndarray:
    """The inverse of `encode_vector`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


class SampleTable:
    """Rows and image features of an evaluation, in a folder.

    Args:
        folder: The evaluation's folder.
        rank: Of this process; each one appends to files of its own.
        processes: How many there are.
        variants: Ways in which every sample is drawn, in the order of the table.
        stem: Name of the file of rows.
    """

    def __init__(
        self, folder: Path, rank: int = 0, processes: int = 1, variants: tuple[str, ...] = BEFORE_AFTER,
        stem: str = SAMPLES,
    ) -> None:  # fmt: skip
        self.folder, self.rank, self.processes, self.variants, self.stem = folder, rank, processes, variants, stem
        self.rows: dict[Key, dict[str, Any]] = {}
        self.features: dict[Key, np.ndarray] = {}

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Make sure that the folder may be written to, and that what it holds belongs to this recipe.

        Raises:
            EvaluationError: The folder holds something else, or an evaluation by another recipe.
        """
        path = self.folder / RECIPE
        if path.is_file():
            try:
                known = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise EvaluationError(f"{path} is damaged: choose another output folder") from error
            changed = differences(known, json.loads(json.dumps(recipe)))
            if changed:
                raise EvaluationError(
                    f"{self.folder} holds an evaluation of something else and cannot be resumed; "
                    f"{'; '.join(changed)}. Choose another output folder, or delete this one"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise EvaluationError(f"{self.folder} is not empty and holds no evaluation: choose another output folder")

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Create the folder and note the recipe. Called by one process.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / RECIPE, (json.dumps(recipe, indent=2) + "\n").encode())
        except OSError as error:
            raise EvaluationError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    def _parts(self, stem: str) -> list[Path]:
        return sorted([*self.folder.glob(f"{stem}.jsonl"), *self.folder.glob(f"{stem}-*.jsonl")])

    def load(self) -> None:
        """Read what all processes have written so far."""
        for path in self._parts(FEATURES):
            for row in read_lines(path):
                self.features[row["sample_id"], row["variant"]] = decode_vector(row["features"])
        for path in self._parts(self.stem):
            for row in read_lines(path):
                self.rows[row["sample_id"], row["variant"]] = row

    def _own(self, stem: str) -> Path:
        return self.folder / (f"{stem}.jsonl" if self.processes == 1 else f"{stem}-{self.rank}.jsonl")

    def append(self, rows: Sequence[dict[str, Any]], features: Sequence[np.ndarray | None]) -> None:
        """Add finished rows. A sample counts as done once its row is there, so its features are written first."""
        vectors = []
        for row, vector in zip(rows, features, strict=True):
            key = row["sample_id"], row["variant"]
            self.rows[key] = row
            if vector is not None:
                self.features[key] = np.asarray(vector, dtype=np.float32)
                vectors.append({"sample_id": key[0], "variant": key[1], "features": encode_vector(vector)})
        _append(self._own(FEATURES), vectors)
        _append(self._own(self.stem), rows)

    def merge(self, order: Sequence[str]) -> None:
        """One file in the order of the plan instead of the parts. Called by one process, when all have finished."""
        rank = {sample_id: index for index, sample_id in enumerate(order)}
        keys = sorted(self.rows, key=lambda key: (self.variants.index(key[1]), rank[key[0]]))
        features = [
            {"sample_id": key[0], "variant": key[1], "features": encode_vector(self.features[key])}
            for key in keys
            if key in self.features
        ]
        for stem, rows in ((FEATURES, features), (self.stem, [self.rows[key] for key in keys])):
            parts = self._parts(stem)
            if rows or parts:
                write_atomically(self.folder / f"{stem}.jsonl", _lines(rows))
            for part in parts:
                if part.name != f"{stem}.jsonl":
                    part.unlink()

    def by_variant(self, order: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Rows of each variant that has any, in the order of the plan."""
        table = {v: [self.rows[s, v] for s in order if (s, v) in self.rows] for v in self.variants}
        return {variant: rows for variant, rows in table.items() if rows}


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        with path.open("ab") as file:
            file.write(_lines(rows))
            file.flush()
