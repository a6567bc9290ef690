"""Detectors that are found by name: options, a recipe, what a network reads in pictures, and what that means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from typing_extensions import TypedDict

from erasure.options import Options, ZeroToOne

if TYPE_CHECKING:
    from PIL import Image

    from erasure.eval.detectors.findings import Box, Finding

# No import of torch here: the command line lists detectors without it.

Golden = Mapping[str, Mapping[str, float]]
"""Known scores by control picture (`whole`, `quarter`; see `erasure.eval.detectors.controls`) and by class."""

BATCH = 16
"""Pictures that a network is given at once."""


class Reading(NamedTuple):
    """What a network says about a picture ahead of any threshold; see `Finding` for the fields."""

    scores: Mapping[str, float]
    boxes: Mapping[str, Box] = MappingProxyType({})


class Recipe(TypedDict):
    """All that a detector's answers depend on, as plain data."""

    detector: str
    """Its name."""
    licence: str
    """Licence of the weights."""
    weights: Mapping[str, str]
    """sha256 of every file of weights, by the file's name."""
    known: bool
    """Whether these are the weights whose scores on the control picture are known."""
    classes: list[str]
    """Every label that a finding may have."""
    flags: list[str]
    """Labels that make a picture a flagged one."""
    threshold: float
    """Score from which a label counts."""
    channels: str
    """Order of the colours that the network is given: `rgb` or `bgr`."""
    side: int
    """Pixels on a side of what the network is given; 0 where the model's own files say it."""
    unit: str
    """Unit of a count: `image` or `box`."""
    preprocessing: str
    """How a picture becomes what the network is given."""
    settings: Mapping[str, object]
    """Further options that say what readings mean."""


READ_BY = ("detector", "weights", "channels", "side", "preprocessing")
"""Parts of a recipe that a reading depends on. The others only say what readings mean, so that a change of them needs
no picture to be read again."""


@dataclass(frozen=True, kw_only=True)
class NamedDetector(Options, ABC):
    """A detector with its options: subclass it as a frozen dataclass and register it.

    `read` gives what a network says; `judge` turns that into a finding without looking at a picture again. Options may
    be missing that are needed to work (a model, a gallery); then `recipe` and `read` say so.
    """

    title: ClassVar[str] = ""
    """One line for lists: what the detector tells."""
    licence: ClassVar[str] = ""
    """Licence of the weights."""
    extra: ClassVar[str] = ""
    """Extra of this package that installs what it needs; empty where nothing is needed."""

    threshold: ZeroToOne = 0.5
    """Score from which a label counts."""

    @abstractmethod
    def recipe(self) -> Recipe:
        """Give all that the answers depend on.

        Raises:
            ErasureError: The detector cannot work: weights, libraries or options are missing.
        """

    @abstractmethod
    def read(self, images: Sequence[Image.Image]) -> Sequence[Reading | Exception]:
        """What the network says about each RGB picture, of any size.

        Raises:
            ErasureError: The detector cannot work: weights, libraries or options are missing.
        """

    @abstractmethod
    def judge(self, reading: Reading) -> Finding:
        """The finding that a reading means, with these options."""

    def golden(self) -> Golden:
        """Scores that known weights give the control pictures with these options; none where not known."""
        return {}

    def __call__(self, images: Sequence[Image.Image]) -> list[Finding | Exception]:
        """One finding for each RGB picture; see `read`."""
        return [
            each if isinstance(each, Exception) else self.judge(each)
            for start in range(0, len(images), BATCH)
            for each in self.read(images[start : start + BATCH])
        ]

    def rejudge(self, finding: Finding) -> Finding:
        """The finding that these options give where another threshold or class set gave this one.

        What nothing could be said about stays so.
        """
        return finding if finding.flagged is None else self.judge(Reading(finding.scores, finding.boxes))
