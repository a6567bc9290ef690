"""Detectors: what is in an image."""

from erasure.eval.detectors.canvas import CanvasJudge, Judgement

__all__ = ["CanvasJudge", "Judgement"]
