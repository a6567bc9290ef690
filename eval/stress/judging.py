"""Any registered detector in the place of a suite's judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from erasure.eval.detectors.base import NamedDetector
from erasure.eval.detectors.findings import ask
from erasure.eval.suites import Target
from erasure.files import digest

NOTHING = "nothing flagged"
"""Answer on a picture that the detector does not flag."""


class ObjectAnswer(NamedTuple):
    """A detector's finding in the form of a judge's answer."""

    object: str | None
    style: str | None


class FlaggingJudge:
    """A detector as a judge: a flagged picture shows the concept.

    It knows nothing of what other prompts ask for, so retained prompts cannot be judged with it.

    Args:
        detector: The detector.
        target: The concept that a flagged picture shows.
    """

    def __init__(self, detector: NamedDetector, target: Target) -> None:
        self.detector, self.target = detector, target
        self.fingerprint = f"{detector.name} ({digest(dict(detector.recipe()))[:12]})"

    def __call__(self, images: Sequence[Image.Image]) -> list[ObjectAnswer | Exception]:
        """One answer for each picture; an exception in the place of one that cannot be judged."""
        answers: list[ObjectAnswer | Exception] = []
        for finding in ask(self.detector, images):
            if finding.flagged is None:
                answers.append(ValueError(finding.reason or "the detector cannot say"))
            else:
                seen = self.target.members[0] if finding.flagged else NOTHING
                is_object = self.target.domain == "object"
                answers.append(ObjectAnswer(seen if is_object else NOTHING, NOTHING if is_object else seen))
        return answers
