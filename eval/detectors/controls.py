"""Controls of a detector: that it is the one that is known, and how well it tells pictures of the user's apart.

A detector that sees nothing would call every erasure a success. `self_test` finds weights or preprocessing that are
not what they should be, on a picture whose scores are known. `measure` says what it is worth on the user's own
pictures: which share of those that show the thing it flags, and which share of the others it leaves alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from erasure import assets
from erasure.errors import EvaluationError, ImageError
from erasure.eval.detectors.base import NamedDetector
from erasure.eval.detectors.findings import Detector, Finding, ask, missing
from erasure.eval.statistics import Interval, too_many_missing, wilson
from erasure.files import shown
from erasure.images import read_rgb

PICTURE = assets.ROOT / "detectors" / "control.webp"
TOLERANCE = 0.02
"""Difference from the known score that processors, and versions of what scales pictures, may make."""
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
POSITIVE, NEGATIVE = "positive", "negative"
"""Folders of pictures that show what the detector looks for, and of pictures that do not."""


class SelfTest(NamedTuple):
    """Outcome of a self-test that did not fail."""

    known_weights: bool
    """Whether the weights are those whose scores are known."""
    compared: int
    """Scores that were compared with the known ones; none where no scores are known."""
    remark: str
    """The outcome in a sentence."""


def control_pictures() -> dict[str, Image.Image]:
    """The control pictures by name: an astronaut's portrait of 192 x 192 pixels, and its lower right quarter."""
    whole = read_rgb(PICTURE)
    return {"whole": whole, "quarter": whole.crop((96, 96, 192, 192))}


def self_test(detector: NamedDetector) -> SelfTest:
    """Check a detector on the control pictures and on one that shows nothing.

    Unknown weights are allowed, and said to be so.

    Raises:
        EvaluationError: It gives no finding for a control picture, a finding for one of a single colour, or known
            weights give other scores than they should.
        ErasureError: The detector cannot work: weights, libraries or options are missing.
    """
    recipe, pictures = detector.recipe(), control_pictures()
    *findings, blank = ask(detector, [*pictures.values(), Image.new("RGB", (192, 192), "gray")])
    if blank.flagged is not None:
        raise EvaluationError(f"the detector {detector.name} has a finding for a picture of one colour: {blank}")
    for finding in findings:
        if finding.flagged is None:
            raise EvaluationError(
                f"the detector {detector.name} cannot say anything about a control picture ({finding.reason}): "
                "install it again, or use another"
            )
    if not recipe["known"]:
        return SelfTest(False, 0, "The weights are unknown: no scores are there to compare with.")
    found, golden = dict(zip(pictures, findings, strict=True)), detector.golden()
    known = [(picture, label, score) for picture, scores in golden.items() for label, score in scores.items()]
    for picture, label, score in known:
        value = found[picture].scores.get(label, 0.0)
        if abs(value - score) > TOLERANCE:
            raise EvaluationError(
                f"the detector {detector.name} gives the control picture ({picture}) {value:.4f} for {label}, "
                f"expected {score:.4f} within {TOLERANCE}: its preprocessing or a library is not as it was when "
                "that was measured. Install it again; do not use its numbers"
            )
    if not known:
        return SelfTest(True, 0, "The weights are known; with these options no scores are there to compare with.")
    return SelfTest(True, len(known), "The weights are known, and the control pictures have their known scores.")


@dataclass(frozen=True)
class Share:
    """A rate of a detector on pictures of the user's."""

    value: float | None
    """`None` where it cannot be given."""
    low: float | None
    """Ends of the 95 % interval (Wilson)."""
    high: float | None
    n: int
    """Pictures about which the detector said something."""
    missing: int
    """Pictures about which it could not say anything."""
    worst: float | None
    """The rate if the detector were wrong about every one of those."""
    reason: str | None = None
    """Why there is no rate."""


@dataclass(frozen=True)
class Measured:
    """What a detector is worth on pictures of the user's."""

    sensitivity: Share
    """Share of pictures that show the thing, of which the detector flags so many."""
    specificity: Share
    """Share of pictures that do not show it, which the detector leaves alone."""
    wrong: Mapping[str, str]
    """Files that it is wrong about, or cannot say anything about, with what it says."""

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def pictures_in(folder: str | Path) -> list[Path]:
    """Files of pictures in a folder and below it, in alphabetical order.

    Raises:
        EvaluationError: It is no folder, or holds no picture.
    """
    if not os.path.isdir(folder):
        raise EvaluationError(f"{shown(str(folder), 200)} is no folder: name one that holds pictures")
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise EvaluationError(
            f"{shown(str(folder), 200)} holds no picture: expected files that end with {', '.join(sorted(ENDINGS))}"
        )
    return found


def ask_files(detector: Detector, files: Sequence[Path], batch: int = 16) -> list[Finding]:
    """One finding for each file. A file that cannot be read is missing, with the reason.

    Args:
        detector: What is asked.
        files: Pictures.
        batch: How many are in memory at once.
    """
    findings: list[Finding] = []
    for start in range(0, len(files), batch):
        read: list[Image.Image | str] = []
        for file in files[start : start + batch]:
            try:
                read.append(read_rgb(file))
            except ImageError as error:
                read.append(str(error))
        answers = iter(ask(detector, [each for each in read if not isinstance(each, str)]))
        findings += [missing(each) if isinstance(each, str) else next(answers) for each in read]
    return findings


def measure(detector: Detector, folder: str | Path) -> Measured:
    """Measure sensitivity and specificity on pictures of the user's.

    Args:
        detector: What is measured.
        folder: Holds `positive/` and `negative/`.

    Raises:
        EvaluationError: One of the two is missing or holds no picture.
    """
    base = Path(folder)
    if absent := [name for name in (POSITIVE, NEGATIVE) if not (base / name).is_dir()]:
        raise EvaluationError(
            f"the controls in {shown(str(folder), 200)} lack the folder {' and '.join(absent)}: pictures that show "
            f"what the detector looks for belong into {POSITIVE}, others into {NEGATIVE}"
        )
    shares, wrong = {}, {}
    for name, right in ((POSITIVE, True), (NEGATIVE, False)):
        files = pictures_in(base / name)
        findings = ask_files(detector, files)
        shares[name] = share([finding.flagged for finding in findings], right)
        for file, finding in zip(files, findings, strict=True):
            if finding.flagged is not right:
                said = "flagged" if finding.flagged else "not flagged"
                wrong[str(file.relative_to(base))] = finding.reason or f"{said}, score {finding.score}"
    return Measured(shares[POSITIVE], shares[NEGATIVE], wrong)


def share(flagged: Sequence[bool | None], right: bool) -> Share:
    """The share of pictures about which a detector is right.

    Args:
        flagged: What it said of each.
        right: What it should have said.
    """
    said = [each for each in flagged if each is not None]
    hits, lost = sum(each is right for each in said), len(flagged) - len(said)
    worst = hits / len(flagged) if flagged else None
    if reason := too_many_missing(lost, len(flagged)):
        return Share(None, None, None, len(said), lost, worst, reason)
    interval: Interval = wilson(hits, len(said))
    return Share(interval.value, interval.low, interval.high, len(said), lost, worst)
