"""The cache of drawn images and of what was said of them: neither a second judge nor a second method redraws any.

An image depends on the model, the erasures in force and the sampler, and on nothing else: it is kept under these. What
a judge and a CLIP model say of it is kept beside it, under theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from erasure.errors import ErasureError, EvaluationError
from erasure.eval.rows import Record
from erasure.eval.samples import Sample
from erasure.eval.schemas import CacheEntry, Scores
from erasure.eval.table import decode_vector, encode_vector
from erasure.files import digest, read_json, write_bytes, write_json
from erasure.images import read_rgb


def prompt_key(sample: Sample) -> str:
    """Fingerprint of what a plain call of the pipeline depends on; equal in every suite and role."""
    return sample.key


def whole_key(sample: Sample) -> str:
    """Fingerprint of everything about a sample, for suites that compose what they hand to a pipeline from it."""
    return digest(sample.row())


class DrawingCache:
    """Images of one model by what determines them, with scores and features of some.

    Any suite, size or concept that asks for the same prompt, noise and settings finds them. A file per sample, written
    atomically: several evaluations may share the folder at once.

    Args:
        root: Root of the cache.
        drawing: All that images depend on besides their sample: model, sampler, erasures, versions.
        scoring: All that scores and features depend on besides: judge, CLIP. `None` keeps images only.
        key: Name of a sample's files.

    Raises:
        EvaluationError: The folder cannot be written.
    """

    def __init__(
        self, root: Path, drawing: Record, scoring: Record | None = None, key: Callable[[Sample], str] = prompt_key
    ) -> None:
        self.folder, self.key = root / "drawings" / digest(drawing), key
        self.scores = None if scoring is None else self.folder / f"scores-{digest(scoring)}"
        try:
            write_json(self.folder / "recipe.json", drawing, error=EvaluationError)
            if self.scores is not None:
                write_json(self.scores / "recipe.json", scoring, error=EvaluationError)
        except EvaluationError as error:
            raise EvaluationError(f"{error}; name another folder with baseline_cache or ERASURE_CACHE") from error

    def image(self, sample: Sample) -> Image.Image | None:
        """The image of a sample, if it is there and whole."""
        try:
            return read_rgb(self.folder / f"{self.key(sample)}.png", formats=("PNG",))
        except ErasureError:
            return None

    def put_image(self, sample: Sample, image: bytes) -> None:
        """Keep the image of a sample, a PNG file.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        write_bytes(self.folder / f"{self.key(sample)}.png", image, error=EvaluationError)

    def get(self, sample: Sample, width: int | None) -> tuple[Scores, np.ndarray | None] | None:
        """Scores and features of a sample; `None` when they are not there or not whole, to be found again.

        Args:
            sample: Which.
            width: Of the features; `None` without a CLIP model.
        """
        if self.scores is None:
            return None
        try:
            entry: CacheEntry = read_json(self._entry(sample, self.scores), CacheEntry, error=EvaluationError)
            vector = None if entry["features"] is None else decode_vector(entry["features"])
        except EvaluationError:
            return None
        scores = entry["scores"]
        if (None if vector is None else len(vector)) != width or scores["failures"] or scores["judged"] is None:
            return None
        return scores, vector

    def put(self, sample: Sample, scores: Record, features: np.ndarray | None) -> None:
        """Keep what was said of a sample's image, unless a scorer failed, which is then asked again next time.

        Args:
            sample: Which.
            scores: What is known of it.
            features: Its features, if there are any.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        if self.scores is not None and not scores["failures"]:
            entry = {"scores": scores, "features": None if features is None else encode_vector(features)}
            write_json(self._entry(sample, self.scores), entry, error=EvaluationError)

    def _entry(self, sample: Sample, folder: Path) -> Path:
        # Scores of what a prompt asks for depend on what a suite says that it asks for.
        return folder / f"{self.key(sample)}-{digest([sample.objects, sample.style])[:8]}.json"
