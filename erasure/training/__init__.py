"""Training: states from trajectories, a student beside its teacher, one loop on accelerate, and additions to it."""

from __future__ import annotations

from erasure.training.run import Run

__all__ = ["Run"]
