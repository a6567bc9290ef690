"""Score images: detectors, CLIP and drift. A failure is a missing value with its reason, never "safe"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from erasure.eval.detections import ReadingMemory, detect
from erasure.eval.detectors.base import NamedDetector
from erasure.eval.detectors.findings import as_row
from erasure.eval.detectors.judging import FindingJudge
from erasure.eval.metrics.clip_score import ClipModel, cosine
from erasure.eval.metrics.drift import feature_drift, pixel_drift
from erasure.eval.rows import Record
from erasure.eval.samples import Sample
from erasure.images import flaw


class Answer(Protocol):
    """A judge's answer on an image. It may also have `objects`, `shape` and tables of scores."""

    @property
    def object(self) -> str | None:
        """The object in the image, if any."""

    @property
    def style(self) -> str | None:
        """The image's style, if any."""


Judge = Callable[[Sequence[Image.Image]], Sequence[Answer | Exception]]
"""Gives an answer for each image; an exception in the place of one that failed."""


def call_judge(judge: Judge, images: Sequence[Image.Image]) -> list[Answer | Exception]:
    """Ask a judge about images: one answer each, or an exception object where it failed."""
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
    """Take from an answer what its row stores: the classes, and the scores of those that the prompt asked for."""

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


@dataclass(frozen=True)
class KeptAnswer:
    """A whole answer of a judge, as it is stored."""

    object: str | None
    objects: list[str]
    style: str | None
    shape: str | None
    object_scores: dict[str, float]
    style_scores: dict[str, float]
    shape_scores: dict[str, float]

    @classmethod
    def of(cls, answer: Answer) -> KeptAnswer | None:
        """Convert an answer to plain data; `None` where it cannot be stored."""
        tables = [
            dict(getattr(answer, name, None) or {}) for name in ("object_scores", "style_scores", "shape_scores")
        ]
        objects, shape = list(getattr(answer, "objects", ())), getattr(answer, "shape", None)
        texts = [answer.object, answer.style, shape, *objects, *(name for table in tables for name in table)]
        values = [value for table in tables for value in table.values()]
        if not all(isinstance(text, str | None) for text in texts):
            return None
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            return None
        first, second, third = ({name: float(value) for name, value in table.items()} for table in tables)
        return cls(answer.object, objects, answer.style, shape, first, second, third)


class Memory(ReadingMemory, Protocol):
    """A memory of answers and features; see `erasure.eval.drawings.DrawingCache`."""

    def answer(self, sample: Sample) -> KeptAnswer | None:
        """Get the judge's answer on a sample's image."""

    def put_answer(self, sample: Sample, answer: KeptAnswer) -> None:
        """Store an answer."""

    def features(self, sample: Sample, width: int) -> tuple[float, np.ndarray] | None:
        """Get the CLIP score and image features of a sample."""

    def put_features(self, sample: Sample, cosine: float, vector: np.ndarray) -> None:
        """Store a CLIP score and image features."""


def score(
    samples: Sequence[Sample], images: Sequence[Image.Image], judge: Judge, clip: ClipModel | None,
    plain: Callable[[Sample, Image.Image], bool] = lambda sample, image: False, memory: Memory | None = None,
    recall: bool = False, detectors: Mapping[str, NamedDetector] | None = None,
) -> tuple[list[Record], list[np.ndarray | None]]:  # fmt: skip
    """Score a batch, and give its image features. Neither judge nor CLIP is asked about an image that shows nothing.

    Args:
        samples: What was asked for.
        images: What was drawn.
        judge: The detector.
        clip: For scores and features, if there is one.
        plain: Whether an image shows what was asked for although it is of one colour: a bare background.
        memory: Where it is kept what is said of the samples' images.
        recall: Whether these are the images that `memory` knows, so that nobody is asked again who has answered.
        detectors: Detectors of the suite, by label. A judge that is made of them answers by what they find.

    Returns:
        Per image `judged`, `clip_score` (the raw cosine), `blank` (whether it shows nothing, see
        `erasure.images.flaw`), `detected` (finding by detector, where there are detectors) and `failures` (reason by
        scorer; that of `image` says why it shows nothing); and its features.
    """
    flaws = [
        None if found is None or plain(sample, image) else found
        for found, sample, image in zip(map(flaw, images), samples, images, strict=True)
    ]
    shown = [index for index, found in enumerate(flaws) if found is None]
    findings = detect(samples, images, detectors or {}, memory, recall)
    if isinstance(judge, FindingJudge) and detectors and judge.is_of(detectors):
        answers: dict[int, Answer | Exception] = {index: judge.answer(findings[index]) for index in shown}
    else:
        answers = _answers(samples, images, shown, judge, memory, recall)
    known, failed = _features(samples, images, shown, clip, memory, recall)
    rows = []
    for index, (sample, found) in enumerate(zip(samples, flaws, strict=True)):
        failures = {} if found is None else {"image": found}
        judged = None
        if found is None:
            failures |= {} if failed is None or index in known else {"clip": failed}
            try:
                answer = answers[index]
                if isinstance(answer, Exception):
                    raise answer
                judged = judgement(answer, sample)
            except Exception as error:
                failures["judge"] = reason(error)
        cosine_of, _ = known.get(index, (None, None))
        row = {"judged": judged, "clip_score": cosine_of, "blank": found is not None, "failures": failures}
        if detectors:
            row["detected"] = {label: as_row(finding) for label, finding in findings[index].items()}
        rows.append(row)
    return rows, [known[index][1] if index in known else None for index in range(len(images))]


def _answers(
    samples: Sequence[Sample], images: Sequence[Image.Image], shown: Sequence[int], judge: Judge,
    memory: Memory | None, recall: bool,
) -> dict[int, Answer | Exception]:  # fmt: skip
    """Ask the judge about some images; give answers by index."""
    known = {index: memory.answer(samples[index]) for index in shown} if memory is not None and recall else {}
    found: dict[int, Answer | Exception] = {index: answer for index, answer in known.items() if answer is not None}
    rest = [index for index in shown if index not in found]
    if rest:
        found |= dict(zip(rest, call_judge(judge, [images[index] for index in rest]), strict=True))
    for index in rest if memory is not None else ():
        answer = found[index]
        try:
            kept = None if isinstance(answer, Exception) else KeptAnswer.of(answer)
        except Exception:  # what is no answer at all is a missing value, see `score`
            kept = None
        if kept is not None and memory is not None:
            memory.put_answer(samples[index], kept)
    return found


def _features(
    samples: Sequence[Sample], images: Sequence[Image.Image], shown: Sequence[int], clip: ClipModel | None,
    memory: Memory | None, recall: bool,
) -> tuple[dict[int, tuple[float, np.ndarray]], str | None]:  # fmt: skip
    """Compute CLIP scores and features of some images, by index, and the reasons where there are none."""
    if clip is None:
        return {}, None
    asked = shown if recall and memory is not None else ()
    kept = {index: memory.features(samples[index], clip.width) for index in asked if memory is not None}
    found = {index: each for index, each in kept.items() if each is not None}
    rest = [index for index in shown if index not in found]
    if not rest:
        return found, None
    try:
        vectors = clip.images([images[index] for index in rest])
        texts = clip.texts([samples[index].prompt for index in rest])
        # A collapsed model draws NaN: no number, so a missing value.
        if not (np.isfinite(vectors).all() and np.isfinite(texts).all()):
            raise ValueError("features that are not finite")
        new = {
            index: (float(value), vector)
            for index, vector, value in zip(rest, vectors, cosine(vectors, texts), strict=True)
        }
    except Exception as error:
        return found, reason(error)
    for index, (value, vector) in new.items() if memory is not None else ():
        if memory is not None:
            memory.put_features(samples[index], value, vector)
    return found | new, None


def reason(error: Exception) -> str:
    """Describe an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def drift(
    before: Image.Image, after: Image.Image, first: np.ndarray | None, second: np.ndarray | None
) -> dict[str, float | None]:
    """Compute pixel and feature drift of a pair: none for images that show nothing, no pixel drift across sizes."""
    if flaw(before) is not None or flaw(after) is not None:
        return {"pixel": None, "feature": None}
    cosine_distance = None if first is None or second is None else float(feature_drift(first[None], second[None])[0])
    same_size = before.size == after.size
    return {"pixel": pixel_drift(before, after) if same_size else None, "feature": cosine_distance}
