"""Detectors: what is in an image. One module each, found by name.

Example:
    >>> from erasure.eval.detectors import ask, get
    >>> ask(get("nsfwjs")(), [image])[0].flagged
    False
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasure.errors import EvaluationError
from erasure.eval.detectors.base import NamedDetector, Reading, Recipe
from erasure.lazy import importer
from erasure.registry import Registry

if TYPE_CHECKING:
    from erasure.eval.detectors.canvas import CanvasJudge, Judgement
    from erasure.eval.detectors.findings import Box, Detector, Finding, ask
    from erasure.eval.detectors.newcomers import NewcomersAnswer, NewcomersJudge

# No import of torch here: the command line lists detectors without it.

__all__ = [
    "DETECTORS",
    "Box",
    "CanvasJudge",
    "Detector",
    "Finding",
    "Judgement",
    "NamedDetector",
    "NewcomersAnswer",
    "NewcomersJudge",
    "Reading",
    "Recipe",
    "ask",
    "available",
    "get",
    "register",
]

_HOMES = {
    **dict.fromkeys(("Box", "Detector", "Finding", "ask"), "erasure.eval.detectors.findings"),
    **dict.fromkeys(("CanvasJudge", "Judgement"), "erasure.eval.detectors.canvas"),
    **dict.fromkeys(("NewcomersJudge", "NewcomersAnswer"), "erasure.eval.detectors.newcomers"),
}

__getattr__ = importer(__name__, _HOMES)


def _refusal(thing: object) -> str:
    """Say what keeps a thing from being a detector; empty where nothing does."""
    is_detector = isinstance(thing, type) and issubclass(thing, NamedDetector)
    return "" if is_detector else "it is no subclass of erasure.eval.detectors.NamedDetector"


DETECTORS: Registry[type[NamedDetector]] = Registry(
    "detector",
    {
        "clip_zero_shot": "erasure.eval.detectors.clip_zero_shot",
        "identity": "erasure.eval.detectors.identity",
        "image_classifier": "erasure.eval.detectors.image_classifier",
        "imagenet": "erasure.eval.detectors.imagenet",
        "nsfwjs": "erasure.eval.detectors.nsfwjs",
        "nudenet": "erasure.eval.detectors.nudenet",
        "open_nsfw": "erasure.eval.detectors.open_nsfw",
    },
    attributes=("title", "licence", "extra", "presets"),
    accepts=_refusal,
    unknown=EvaluationError,
)

register, available, get = DETECTORS.register, DETECTORS.names, DETECTORS.get
