"""The cache of the base model's samples: one method after another is measured against the same images."""

from __future__ import annotations

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


class BaselineCache:
    """Judged rows, features and images of a stock model, by what determines the image.

    Any suite, size or concept that asks for the same prompt, noise and settings finds it. A file per sample, written
    atomically: several evaluations may share the folder at once.

    Args:
        folder: Root of the cache.
        model: Fingerprint of the stock model.
        recipe: Everything else that the rows depend on: sampler, judge, CLIP, versions.

    Raises:
        EvaluationError: The folder cannot be written.
    """

    def __init__(self, folder: Path, model: str, recipe: Record) -> None:
        self.folder = folder / "baselines" / f"{model}-{digest(recipe)}"
        try:
            write_json(self.folder / "recipe.json", recipe, error=EvaluationError)
        except EvaluationError as error:
            raise EvaluationError(f"{error}; name another folder with baseline_cache or ERASURE_CACHE") from error

    def image(self, sample: Sample) -> Image.Image | None:
        """The stock model's image of a sample, if it is there, whole, and of the sample's size."""
        try:
            image = read_rgb(self.folder / f"{sample.key}.png", formats=("PNG",))
        except ErasureError:
            return None
        return image if image.size == (sample.width, sample.height) else None

    def get(self, sample: Sample, width: int | None) -> tuple[Scores, np.ndarray | None, Image.Image] | None:
        """Scores, features and image of a sample; `None` when they are not there or not whole, to be made again.

        Args:
            sample: Which.
            width: Of the features; `None` without a CLIP model.
        """
        image = self.image(sample)
        if image is None:
            return None
        try:
            entry: CacheEntry = read_json(self.folder / f"{sample.key}.json", CacheEntry, error=EvaluationError)
            vector = None if entry["features"] is None else decode_vector(entry["features"])
        except EvaluationError:
            return None
        scores = entry["scores"]
        if (None if vector is None else len(vector)) != width or scores["failures"] or scores["judged"] is None:
            return None
        return scores, vector, image

    def put(self, sample: Sample, image: bytes, scores: Record, features: np.ndarray | None) -> None:
        """Keep a sample. Samples whose detection failed are kept as images only, to be judged again next time.

        Args:
            sample: Which.
            image: As a PNG file.
            scores: What is known of it.
            features: Its features, if there are any.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        write_bytes(self.folder / f"{sample.key}.png", image, error=EvaluationError)
        if not scores["failures"]:
            entry = {"scores": scores, "features": None if features is None else encode_vector(features)}
            write_json(self.folder / f"{sample.key}.json", entry, error=EvaluationError)
