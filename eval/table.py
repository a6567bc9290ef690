"""The sample table on disk: append-only JSON lines that survive a kill, in parts when several processes write."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from erasure.errors import EvaluationError, ResultsFolderError
from erasure.eval.rows import Record, Row
from erasure.eval.samples import Sample
from erasure.eval.schemas import EvaluationRow, FeatureRow, ReportRow
from erasure.files import differences, inside, read_bytes, read_lines, shown, validated, write_bytes

SAMPLES = "samples"
FEATURES = "features"
IMAGES = "images"
BEFORE_AFTER = ("before", "after")
"""Variants of a suite that measures erasures."""
LIMIT = 2**30
"""Bytes of a file of rows."""
Key = tuple[str, str]
"""Sample id and variant."""


def read_rows(path: Path, schema: type = ReportRow) -> list[Record]:
    """Rows of a JSON-lines file; an unfinished last line, as a killed run leaves it, is left out.

    Args:
        path: The file.
        schema: What a row must be.

    Raises:
        EvaluationError: It cannot be read, or a line is damaged.
    """
    rows: list[Record] = []
    try:
        rows.extend(read_lines(path, schema, torn=True, limit=LIMIT, error=ResultsFolderError))
    except ResultsFolderError as error:
        raise ResultsFolderError(f"{error}. A line that is deleted is made again by the next run") from error
    return rows


def image_path(folder: Path, variant: str, sample_id: str) -> Path:
    """Give the path of a sample's image.

    Raises:
        EvaluationError: The names would lead out of the evaluation's folder.
    """
    return inside(folder, IMAGES, variant, f"{sample_id}.png", error=ResultsFolderError)


def encode_vector(vector: np.ndarray) -> str:
    """Encode a vector as base64 of little-endian float32."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def decode_vector(text: str) -> np.ndarray:
    """Decode a vector from text, the inverse of `encode_vector`.

    Raises:
        EvaluationError: It is no such text, or holds NaN.
    """
    try:
        vector = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except ValueError as error:
        raise EvaluationError(f"{shown(text)} is no vector of float32 in base64 ({error})") from error
    if not vector.size or not np.isfinite(vector).all():
        raise EvaluationError(f"a vector of {vector.size} values, wanted: some, all finite")
    return vector


class SampleTable:
    """Rows and image features of an evaluation, in a folder.

    Args:
        folder: The evaluation's folder.
        samples: What is drawn, in the order of the table.
        rank: Of this process; each one appends to files of its own.
        processes: How many there are.
        variants: Ways in which every sample is drawn, in the order of the table.
        stem: Name of the file of rows.
        schema: What a row must be.

    Raises:
        EvaluationError: Two samples have one id, or an id cannot be the name of an image.
    """

    def __init__(
        self, folder: Path, samples: Sequence[Sample], rank: int = 0, processes: int = 1,
        variants: tuple[str, ...] = BEFORE_AFTER, stem: str = SAMPLES, schema: type = EvaluationRow,
    ) -> None:  # fmt: skip
        self.folder, self.rank, self.processes = folder, rank, processes
        self.variants, self.stem, self.schema = variants, stem, schema
        self.samples: dict[str, Sample] = {}
        for sample in samples:
            if sample.sample_id in self.samples:
                raise EvaluationError(f"two samples are called {shown(sample.sample_id)}: give each an id of its own")
            self.samples[sample.sample_id] = sample
            image_path(folder, variants[0], sample.sample_id)
        self.rows: dict[Key, Record] = {}
        self.features: dict[Key, np.ndarray] = {}

    def _parts(self, stem: str) -> list[Path]:
        found = sorted([*self.folder.glob(f"{stem}.jsonl"), *self.folder.glob(f"{stem}-*.jsonl")])
        return [inside(self.folder, path.name, error=ResultsFolderError) for path in found]

    def cut(self) -> None:
        """Remove unfinished last lines, to which the next rows would be appended. Called by one process.

        Raises:
            EvaluationError: A file cannot be read or written.
        """
        for path in [*self._parts(FEATURES), *self._parts(self.stem)]:
            content = read_bytes(path, LIMIT, error=ResultsFolderError)
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                try:
                    os.truncate(path, whole)
                except OSError as error:
                    raise ResultsFolderError(f"cannot write to {path}: {error.strerror or error}") from error

    def drop_incomplete(self) -> None:
        """Take out rows whose image features are lost with their file, so that both are made again.

        Called by one process.

        Raises:
            EvaluationError: As `load`, or a file cannot be written.
        """
        self.load()
        lost = [
            key for key, row in self.rows.items() if row.get("clip_score") is not None and key not in self.features
        ]
        if lost:
            for key in lost:
                del self.rows[key]
            self.merge()

    def load(self) -> None:
        """Read the rows of all processes.

        Raises:
            EvaluationError: A file cannot be read, a line is damaged, or a row is of another evaluation.
        """
        self.rows, self.features = {}, {}
        for path in self._parts(FEATURES):
            for row in read_rows(path, FeatureRow):
                self.features[self._key(row, path)] = self._vector(row, path)
        for path in self._parts(self.stem):
            for row in read_rows(path, self.schema):
                key = self._key(row, path)
                self._check(row, key, path)
                self.rows[key] = row

    def _key(self, row: Row, path: Path) -> Key:
        key = row["sample_id"], row["variant"]
        if key[0] not in self.samples or key[1] not in self.variants:
            raise ResultsFolderError(
                f"{path} has a row of sample {shown(key[0])}, variant {shown(key[1])}, which are not of this "
                "evaluation: delete the line, or give another output folder"
            )
        return key

    def _vector(self, row: Row, path: Path) -> np.ndarray:
        try:
            vector = decode_vector(row["features"])
            width = len(next(iter(self.features.values()), vector))
            if len(vector) != width:
                raise EvaluationError(f"a vector of {len(vector)} values where others have {width}")
        except EvaluationError as error:
            raise ResultsFolderError(
                f"{path}, features of {shown(row['sample_id'])}: {error}; delete this file and the other "
                f"*.jsonl of the folder to measure again"
            ) from error
        return vector

    def _check(self, row: Record, key: Key, path: Path) -> None:
        planned = self.samples[key[0]].row()
        there = {name: row.get(name) for name in planned}
        if there != planned and (changed := differences(there, planned)):
            raise ResultsFolderError(
                f"{path} has a row of {shown(key[0])} that is not of this evaluation; {'; '.join(changed[:3])}. "
                "Delete the line to redo its sample"
            )
        if self.rows.get(key, row) != row:
            raise ResultsFolderError(
                f"{path} has a second row of {shown(key[0])} ({key[1]}) that says something else: delete one of them"
            )

    def _own(self, stem: str) -> Path:
        return self.folder / (f"{stem}.jsonl" if self.processes == 1 else f"{stem}-{self.rank}.jsonl")

    def append(self, rows: Sequence[Record], features: Sequence[np.ndarray | None]) -> None:
        """Append finished rows. Features are written before the row, because a sample is done once its row is there.

        Raises:
            EvaluationError: They cannot be written, or could not be read again (a detector may answer anything); what
                was there before is still there.
        """
        for row in rows:
            validated(row, self.schema, f"the row of {shown(row['sample_id'])}", error=EvaluationError)
        keys = [(row["sample_id"], row["variant"]) for row in rows]
        pairs = [(key, vector) for key, vector in zip(keys, features, strict=True) if vector is not None]
        _append(self._own(FEATURES), [_feature_row(key, vector) for key, vector in pairs])
        _append(self._own(self.stem), rows)
        self.features.update({key: np.asarray(vector, dtype=np.float32) for key, vector in pairs})
        self.rows.update(zip(keys, rows, strict=True))

    def merge(self) -> None:
        """Merge all parts into one file in the order of the plan. Called by one process, when all have finished."""
        order = [(sample_id, variant) for variant in self.variants for sample_id in self.samples]
        features = [_feature_row(key, self.features[key]) for key in order if key in self.features]
        for stem, rows in ((FEATURES, features), (self.stem, [self.rows[key] for key in order if key in self.rows])):
            parts = self._parts(stem)
            if rows or parts:
                write_bytes(self.folder / f"{stem}.jsonl", _lines(rows), error=ResultsFolderError)
            for part in parts:
                if part.name != f"{stem}.jsonl":
                    part.unlink()

    def by_variant(self) -> dict[str, list[Record]]:
        """Group rows by variant, in the order of the plan."""
        table = {v: [self.rows[s, v] for s in self.samples if (s, v) in self.rows] for v in self.variants}
        return {variant: rows for variant, rows in table.items() if rows}


def _feature_row(key: Key, vector: np.ndarray) -> Record:
    return {"sample_id": key[0], "variant": key[1], "features": encode_vector(vector)}


def _lines(rows: Iterable[Row]) -> bytes:
    try:
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"a row that cannot be written as JSON ({error}): rows hold plain, finite data"
        ) from error


def _append(path: Path, rows: Sequence[Row]) -> None:
    """Append lines to a file, all or none."""
    if not rows:
        return
    content = memoryview(_lines(rows))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # not every system has them
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags, 0o666)
        try:
            before = os.fstat(handle).st_size
            try:
                while content:
                    content = content[os.write(handle, content) :]
                os.fsync(handle)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise ResultsFolderError(
            f"cannot write to {path} ({error.strerror or error}): nothing that was there is lost; make room, or make "
            "it a plain file, and run the same again"
        ) from error
