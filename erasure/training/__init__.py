"""Training on accelerate: states from trajectories, students that share the teacher's network, one loop, additions."""

from __future__ import annotations

from erasure.training.run import Run

__all__ = ["Run"]
