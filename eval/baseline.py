"""The cache of the base model's samples: one method after another is measured against the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erasure.cache import digest
from erasure.errors import EvaluationError
from erasure.eval.results import write_atomically
from erasure.eval.samples import Sample
from erasure.eval.table import decode_vector, encode_vector


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

    def __init__(self, folder: Path, model: str, recipe: dict[str, Any]) -> None:
        self.folder = folder / "baselines" / f"{model}-{digest(recipe)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "recipe.json", (json.dumps(recipe, indent=2) + "\n").encode())
        except OSError as error:
            raise EvaluationError(
                f"cannot write the baseline cache {self.folder}: {error.strerror or error}; "
                "name another folder with baseline_cache or ERASURE_CACHE"
            ) from error

    def image(self, sample: Sample) -> Image.Image | None:
        """The stock model's image of a sample, if it is there and whole."""
        try:
            with Image.open(self.folder / f"{sample.key}.png") as image:
                return image.convert("RGB")
        except OSError:
            return None

    def get(self, sample: Sample) -> tuple[dict[str, Any], np.ndarray | None] | None:
        """Scores and features of a sample, if it is there with its image."""
        try:
            entry = json.loads((self.folder / f"{sample.key}.json").read_text())
        except (OSError, ValueError):
            return None
        if self.image(sample) is None:
            return None
        vector = entry["features"]
        return entry["scores"], None if vector is None else decode_vector(vector)

    def put(self, sample: Sample, png: bytes, scores: dict[str, Any], features: np.ndarray | None) -> None:
        """Keep a sample. Samples whose detection failed are kept as images only, to be judged again next time."""
        write_atomically(self.folder / f"{sample.key}.png", png)
        if not scores["failures"]:
            entry = {"scores": scores, "features": None if features is None else encode_vector(features)}
            write_atomically(self.folder / f"{sample.key}.json", json.dumps(entry).encode())
