"""Paired drift: how far images of retained prompts move when only the erasure changes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from erasure.errors import EvaluationError
from erasure.images import rgb


def pixel_drift(before: Image.Image, after: Image.Image) -> float:
    """Mean absolute difference over all pixels and channels, 0 (same image) to 1 (black against white).

    Both images come from the same noise, so that whatever differs is the erasure's doing.

    Raises:
        EvaluationError: The images differ in size, or one cannot be decoded.
    """
    if before.size != after.size:
        raise EvaluationError(f"drift compares images of one size, got {before.size} and {after.size}")
    first, second = (np.asarray(rgb(image, error=EvaluationError), dtype=np.float64) for image in (before, after))
    return float(np.abs(first - second).mean() / 255)


def feature_drift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`1 - cos(before, after)` per pair of features `(images, dim)` -> `(images,)`, 0 to 2."""
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return 1 - (first * second).sum(-1) / np.maximum(norms, 1e-12)
