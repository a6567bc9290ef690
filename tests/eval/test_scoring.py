"""What cannot be measured is a missing value with its reason or a named error, never a number that looks good."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from erasure.errors import EvaluationError
from erasure.eval.metrics.clip_score import clip_score
from erasure.eval.metrics.distances import cmmd, frechet, kid
from erasure.eval.metrics.drift import pixel_drift
from erasure.eval.metrics.perceptual import lpips, pixels
from erasure.eval.samples import Sample
from erasure.eval.scoring import drift, score

SAMPLE = Sample("cat-0", "a cat", 7, "target", ("cat",), "ink", ("cat",))
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def half() -> Image.Image:
    """A picture whose file ends in the middle; Pillow notices only when it is used."""
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:400]))


class Clip:
    def __init__(self, *values: float) -> None:
        self.values = np.array([values], dtype=np.float32)

    def images(self, images: Any) -> np.ndarray:
        return self.values

    def texts(self, prompts: Any) -> np.ndarray:
        return np.ones_like(self.values)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_missing(value: float) -> None:
    def judge(images: Any) -> list[Any]:
        return [SimpleNamespace(object="cat", style="ink")]

    (row,), (features,) = score([SAMPLE], [IMAGE], judge, Clip(1.0, value))  # type: ignore[arg-type]
    assert row["clip_score"] is features is None
    assert row["failures"] == {"clip": "ValueError: features that are not finite"}
    (row,), (features,) = score([SAMPLE], [IMAGE], judge, Clip(1.0, 1.0))  # type: ignore[arg-type]
    assert row["failures"] == {}
    assert features is not None


def test_scores_of_a_judge_that_are_not_finite_are_missing() -> None:
    def judge(images: Any) -> list[Any]:
        return [SimpleNamespace(object="cat", style="ink", object_scores={"cat": np.nan})]

    (row,), _ = score([SAMPLE], [IMAGE], judge, None)
    assert row["judged"] is None
    assert row["failures"] == {"judge": "ValueError: a score of nan"}


def test_distances_refuse_features_that_are_not_finite() -> None:
    good = np.random.default_rng(0).normal(size=(8, 3))
    bad = good.copy()
    bad[3, 1] = np.nan
    for distance in (lambda a, b: frechet(a, b, allow_small=True), cmmd, kid):
        for first, second in ((good, bad), (bad, good)):
            with pytest.raises(EvaluationError, match="NaN or infinity"):
                distance(first, second)
    for cosines in ([0.5, np.nan], []):
        with pytest.raises(EvaluationError, match="all finite"):
            clip_score(cosines)


def test_broken_pictures_are_named() -> None:
    with pytest.raises(EvaluationError, match="image 1 cannot be decoded"):
        pixels([IMAGE, half()])
    with pytest.raises(EvaluationError, match="cannot be decoded"):
        pixel_drift(IMAGE, half())
    with pytest.raises(EvaluationError, match="images of one size"):
        lpips([IMAGE], [IMAGE.resize((8, 8))], nn.Identity())


def test_neither_judge_nor_clip_is_asked_about_images_that_show_nothing() -> None:
    asked: list[Any] = []

    def judge(images: Any) -> list[Any]:
        asked.extend(images)
        return [SimpleNamespace(object="cat", style="ink") for _ in images]

    blank, tiny = Image.new("RGB", (16, 16), "#808080"), Image.new("RGB", (2, 2))
    rows, features = score([SAMPLE] * 4, [blank, IMAGE, tiny, half()], judge, Clip(1.0, 1.0))  # type: ignore[arg-type]
    assert asked == [IMAGE]
    assert [row["judged"] is None for row in rows] == [row["blank"] for row in rows] == [True, False, True, True]
    assert [row["clip_score"] is None for row in rows] == [True, False, True, True]
    assert [vector is None for vector in features] == [True, False, True, True]
    assert rows[0]["failures"] == {"image": "a picture of one colour, #808080"}
    assert rows[1]["failures"] == {}
    assert "2 x 2" in rows[2]["failures"]["image"]
    assert "cannot be decoded" in rows[3]["failures"]["image"]


def test_no_drift_between_images_of_which_one_shows_nothing() -> None:
    vector, blank = np.ones(4, dtype=np.float32), Image.new("RGB", (16, 16))
    assert drift(IMAGE, IMAGE, vector, vector)["pixel"] == 0
    for pair in ((IMAGE, blank), (blank, IMAGE), (blank, blank)):
        assert drift(*pair, vector, vector) == {"pixel": None, "feature": None}
