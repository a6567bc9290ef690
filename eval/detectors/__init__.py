"""Detectors: what is in an image."""

from erasure.eval.detectors.canvas import CanvasJudge, Judgement
from erasure.eval.detectors.newcomers import NewcomersJudge, Seen

__all__ = ["CanvasJudge", "Judgement", "NewcomersJudge", "Seen"]
