"""Score images: detectors, CLIP and drift. A failure is a missing value with its reason, never "safe"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from erasure.eval.metrics.clip_score import ClipModel, cosine
from erasure.eval.metrics.drift import feature_drift, pixel_drift
from erasure.eval.rows import Record
from erasure.eval.samples import Sample
from erasure.images import flaw


class Answer(Protocol):
    """What a detector sees in an image. It may give `objects`, `shape` and tables of scores besides."""

    @property
    def object(self) -> str | None:
        """The object in it, if any."""

    @property
    def style(self) -> str | None:
        """Its style, if any."""


Judge = Callable[[Sequence[Image.Image]], Sequence[Answer]]


def call_judge(judge: Judge, images: Sequence[Image.Image]) -> list[Answer | Exception]:
    """One answer per image; an exception object in the place of an answer that failed."""
    try:
        answers: list[Answer | Exception] = list(judge(images))
        if len(answers) == len(images):
            return answers
        raise ValueError(f"{len(answers)} answers for {len(images)} images")
    except Exception as error:  # a detector may fail in any way
        if len(images) == 1:
            return [error]
        return [answer for image in images for answer in call_judge(judge, [image])]


def judgement(answer: Answer, sample: Sample) -> Record:
    """What the result row keeps of an answer: the classes, and the scores of what the prompt asked for."""

    def score(table: str, name: str | None) -> float | None:
        value = (getattr(answer, table, None) or {}).get(name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"a score of {value}")
        return None if value is None else round(float(value), 6)

    wanted = sample.objects[0] if sample.objects else None
    return {
        "object": answer.object,
        "objects": list(getattr(answer, "objects", ())),
        "style": answer.style,
        "shape": getattr(answer, "shape", None),
        "object_score": score("object_scores", wanted),
        "style_score": score("style_scores", sample.style),
        "shape_score": score("shape_scores", wanted),
    }


def score(
    samples: Sequence[Sample], images: Sequence[Image.Image], judge: Judge, clip: ClipModel | None,
    plain: Callable[[Sample, Image.Image], bool] = lambda sample, image: False,
) -> tuple[list[Record], list[np.ndarray | None]]:  # fmt: skip
    """Scores and image features of a batch. Neither judge nor CLIP is asked about an image that shows nothing.

    Args:
        samples: What was asked for.
        images: What was drawn.
        judge: The detector.
        clip: For scores and features, if there is one.
        plain: Whether an image shows what was asked for although it is of one colour: a bare background.

    Returns:
        Per image `judged`, `clip_score` (the raw cosine), `blank` (whether it shows nothing, see
        `erasure.images.flaw`) and `failures` (reason by scorer; that of `image` says why it shows nothing); and its
        features.
    """
    flaws = [
        None if found is None or plain(sample, image) else found
        for found, sample, image in zip(map(flaw, images), samples, images, strict=True)
    ]
    shown = [index for index, found in enumerate(flaws) if found is None]
    features: list[np.ndarray | None] = [None] * len(images)
    cosines: list[float | None] = [None] * len(images)
    answers: dict[int, Answer | Exception] = {}
    failed: str | None = None
    if shown:
        pictures = [images[index] for index in shown]
        answers = dict(zip(shown, call_judge(judge, pictures), strict=True))
        if clip is not None:
            try:
                vectors = clip.images(pictures)
                texts = clip.texts([samples[index].prompt for index in shown])
                # A collapsed model draws NaN: no number, so a missing value.
                if not (np.isfinite(vectors).all() and np.isfinite(texts).all()):
                    raise ValueError("features that are not finite")
                for index, vector, value in zip(shown, vectors, cosine(vectors, texts), strict=True):
                    features[index], cosines[index] = vector, float(value)
            except Exception as error:
                failed = reason(error)
    rows = []
    for index, (sample, found) in enumerate(zip(samples, flaws, strict=True)):
        failures = {} if found is None else {"image": found}
        judged = None
        if found is None:
            failures |= {} if failed is None else {"clip": failed}
            try:
                answer = answers[index]
                if isinstance(answer, Exception):
                    raise answer
                judged = judgement(answer, sample)
            except Exception as error:
                failures["judge"] = reason(error)
        rows.append({"judged": judged, "clip_score": cosines[index], "blank": found is not None, "failures": failures})
    return rows, features


def reason(error: Exception) -> str:
    """One line that says what went wrong."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def drift(
    before: Image.Image, after: Image.Image, first: np.ndarray | None, second: np.ndarray | None
) -> dict[str, float | None]:
    """Pixel and feature drift of one pair: none where one of the two shows nothing, none in pixels across sizes."""
    if flaw(before) is not None or flaw(after) is not None:
        return {"pixel": None, "feature": None}
    cosine_distance = None if first is None or second is None else float(feature_drift(first[None], second[None])[0])
    same_size = before.size == after.size
    return {"pixel": pixel_drift(before, after) if same_size else None, "feature": cosine_distance}
