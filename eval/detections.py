"""Detectors of an evaluation: which look at the images, what they are worth, and what they find in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from erasure import __version__
from erasure.eval.detectors.base import READ_BY, NamedDetector, Reading, Recipe
from erasure.eval.detectors.controls import Measured, SelfTest, measure, self_test
from erasure.eval.detectors.findings import Finding, ask, checked
from erasure.eval.rows import Record
from erasure.eval.samples import Sample
from erasure.images import flaw


@dataclass(frozen=True)
class TestedDetector:
    """A detector that has passed its self-test, with its sensitivity and specificity on the user's pictures."""

    label: str
    """Under which its findings are in rows and metrics."""
    detector: NamedDetector
    recipe: Recipe
    tested: SelfTest
    measured: Measured | None = None
    """`None` where no pictures of the user's were given."""

    @classmethod
    def of(cls, label: str, detector: NamedDetector, controls: str | Path | None = None) -> TestedDetector:
        """Test a detector before any image is drawn.

        Args:
            label: Under which its findings are.
            detector: The detector.
            controls: Folder with `positive/` and `negative/`.

        Raises:
            EvaluationError: It does not pass, or the folder lacks pictures.
            ErasureError: The detector cannot work: weights, libraries or options are missing.
        """
        tested = self_test(detector)
        return cls(
            label, detector, detector.recipe(), tested, None if controls is None else measure(detector, controls)
        )

    @property
    def entry(self) -> Record:
        """Describe the detector for results."""
        measured = None if self.measured is None else self.measured.to_dict()
        return {
            "label": self.label, "recipe": dict(self.recipe), "self_test": self.tested._asdict(),
            "controls": measured,
        }  # fmt: skip

    @property
    def read_by(self) -> Record:
        """Give all that readings depend on besides the image; thresholds and class sets are not part of it."""
        return {**{key: dict(self.recipe)[key] for key in READ_BY}, "package": __version__}


class ReadingMemory(Protocol):
    """A memory of detectors' readings; see `erasure.eval.drawings.DrawingCache`."""

    def reading(self, sample: Sample, label: str) -> Reading | None:
        """Get the reading of a sample's image by a detector's network."""

    def put_reading(self, sample: Sample, label: str, reading: Reading) -> None:
        """Store a reading."""


def detect(
    samples: Sequence[Sample], images: Sequence[Image.Image], detectors: Mapping[str, NamedDetector],
    memory: ReadingMemory | None = None, recall: bool = False,
) -> list[dict[str, Finding]]:  # fmt: skip
    """Run every detector on every image of a batch; see `ask` for images that cannot be judged.

    Args:
        samples: What was asked for.
        images: What was drawn.
        detectors: By label.
        memory: Where it is kept what was read in the samples' images.
        recall: Whether these are the images that `memory` knows, so that no network is asked again that has answered.

    Returns:
        Per image a finding of every detector, by label.

    Raises:
        ErasureError: A detector cannot work at all.
    """
    found: list[dict[str, Finding]] = [{} for _ in images]
    shown = [index for index, image in enumerate(images) if flaw(image) is None]
    for label, detector in detectors.items():
        for index in shown if memory is not None and recall else ():
            known = None if memory is None else memory.reading(samples[index], label)
            judged = None if known is None else _judged(detector, known)
            if judged is not None:
                found[index][label] = judged
        rest = [index for index in range(len(images)) if label not in found[index]]
        for index, finding in zip(rest, ask(detector, [images[index] for index in rest]), strict=True):
            found[index][label] = finding
            if memory is not None and finding.flagged is not None:
                memory.put_reading(samples[index], label, Reading(finding.scores, finding.boxes))
    return found


def _judged(detector: NamedDetector, reading: Reading) -> Finding | None:
    """Judge a stored reading; `None` where it cannot be used."""
    try:
        finding = checked(detector.judge(reading))
    except Exception:  # a file that was changed by hand, for instance
        return None
    return None if finding.flagged is None else finding
