"""What a detector finds in a picture, and how it is asked: what it cannot judge is missing, never "safe"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from PIL import Image

from erasure.errors import ArtifactError, ErasureError, EvaluationError, MissingExtraError, OptionError
from erasure.images import flaw, rgb

UNUSABLE = (ArtifactError, EvaluationError, MissingExtraError, OptionError)
"""Errors of a detector that cannot work at all: no weights, no library, no gallery. No picture is at fault."""


class Box(NamedTuple):
    """A rectangle in pixels of the picture as it was given."""

    left: float
    top: float
    right: float
    bottom: float


class Finding(NamedTuple):
    """What a detector says about one picture."""

    flagged: bool | None
    """Whether the picture shows what the detector looks for; `None` where it cannot say, which never means "safe"."""
    score: float | None
    """Number from 0 to 1 that a threshold is compared with, kept so that another threshold needs no new run."""
    labels: frozenset[str] = frozenset()
    """Classes that are seen, of those that the detector's recipe lists."""
    scores: Mapping[str, float] = MappingProxyType({})
    """Score from 0 to 1 by class. A second region of a class is called `CLASS#2`, a third `CLASS#3`."""
    boxes: Mapping[str, Box] = MappingProxyType({})
    """Boxes in which each thing is seen, by the names of `scores`."""
    reason: str | None = None
    """Why it cannot say, where `flagged` is `None`."""


class Detector(Protocol):
    """A detector of something in pictures."""

    @property
    def name(self) -> str:
        """Short name in results."""
        ...

    @property
    def licence(self) -> str:
        """Licence of the weights."""
        ...

    def recipe(self) -> Mapping[str, object]:
        """Give all that its answers depend on, as plain data: weights' sha256, classes, threshold, preprocessing."""
        ...

    def __call__(self, images: Sequence[Image.Image]) -> Sequence[Finding | Exception]:
        """One finding for each RGB picture; an exception in the place of one that failed."""
        ...


def missing(reason: str) -> Finding:
    """Make the finding of a picture that cannot be judged."""
    return Finding(None, None, reason=reason)


def as_row(finding: Finding) -> dict[str, object]:
    """Give a finding as plain data, as rows of samples and results of commands hold it."""
    return {
        "flagged": finding.flagged, "score": finding.score, "labels": sorted(finding.labels),
        "scores": dict(finding.scores), "boxes": {name: list(box) for name, box in finding.boxes.items()},
        "reason": finding.reason,
    }  # fmt: skip


def ask(detector: Detector, images: Sequence[Image.Image]) -> list[Finding]:
    """Ask a detector about pictures of any mode and size, so that no failure passes for "nothing there".

    A picture that shows nothing (see `erasure.images.flaw`: one colour, transparent, tiny, damaged, not finite) is not
    given to the detector. Where the detector fails on a batch or gives the wrong number of answers, it is asked about
    one picture at a time. An answer that is no finding, or holds a number that is not finite, is none.

    Args:
        detector: What is asked.
        images: Pictures, in RGB or what `erasure.images.rgb` turns into it.

    Returns:
        One finding for each picture; `flagged` is `None` and `reason` says why where nothing can be said.

    Raises:
        ErasureError: The detector cannot work at all (see `UNUSABLE`), whatever the picture.
    """
    findings = [missing(found) if (found := flaw(image)) else None for image in images]
    pictures: dict[int, Image.Image] = {}
    for index, image in enumerate(images):
        if findings[index] is None:
            try:
                pictures[index] = rgb(image)
            except ErasureError as error:
                findings[index] = missing(str(error))
    answers = _answers(detector, list(pictures.values()))
    for index, answer in zip(pictures, answers, strict=True):
        findings[index] = checked(answer)
    return [finding for finding in findings if finding is not None]


def _answers(detector: Detector, pictures: Sequence[Image.Image]) -> list[object]:
    """Get one answer for each picture; an exception where the detector failed on that picture."""
    if not pictures:
        return []
    try:
        answers: list[object] = list(detector(pictures))
        if len(answers) == len(pictures):
            return answers
        raise ValueError(f"{len(answers)} findings for {len(pictures)} pictures")
    except UNUSABLE:
        raise
    except Exception as error:  # a detector may fail in any way
        if len(pictures) == 1:
            return [error]
        return [answer for picture in pictures for answer in _answers(detector, [picture])]


def checked(answer: object) -> Finding:
    """Check a detector's answer, and convert it to a finding."""
    if isinstance(answer, UNUSABLE):
        raise answer
    if isinstance(answer, Exception):
        text = str(answer).strip().splitlines()
        return missing(f"{type(answer).__name__}: {text[0][:300] if text else 'no message'}")
    if not isinstance(answer, Finding):
        return missing(f"the detector gave {type(answer).__name__}, expected a Finding")
    if answer.flagged is None:
        return answer if answer.reason else answer._replace(reason="the detector gave no reason")
    if not isinstance(answer.flagged, bool):
        return missing(f"the detector's `flagged` is {type(answer.flagged).__name__}, expected True, False or None")
    numbers = [*answer.scores.values(), *(value for box in answer.boxes.values() for value in box)]
    if answer.score is not None:
        numbers.append(answer.score)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        return missing("the detector gave scores that are not finite")
    return answer
