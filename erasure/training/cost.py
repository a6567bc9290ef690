"""Cost of training in forward passes of the denoiser per sample, a unit that does not depend on the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from erasure.errors import TrainingError
from erasure.interop.protocols import Prediction

BACKWARD = 2
"""Number of forward passes that a backward pass counts as, by convention."""
PHASES: tuple[Literal["setup", "rollout", "update"], ...] = ("setup", "rollout", "update")


class DenoiserCost:
    """Counts forward passes per row of the denoiser, plus `BACKWARD` passes per row when gradients flow through it.

    Blocks that gradient checkpointing runs twice count twice. A resumed training continues its counts and times;
    sessions that were interrupted count up to their last checkpoint.

    Attributes:
        forwards: Number of passes in all.
        rollout_forwards: Number of passes for sampling trajectories before the training.
        seconds: Seconds by phase, see `begin`.
        earlier_seconds: Seconds of earlier sessions.
        sessions: Number of sessions, with this one.
    """

    def __init__(self) -> None:
        self.forwards = self.rollout_forwards = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.earlier_seconds, self.sessions = 0.0, 1
        self._phase, self._since = PHASES[0], time.perf_counter()

    def begin(self, phase: Literal["setup", "rollout", "update"]) -> None:
        """Count time as this phase from now on."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        if self._phase == "rollout":
            self.rollout_forwards = self.forwards
        self._phase, self._since = phase, now

    @contextmanager
    def counting(self, denoiser: nn.Module) -> Iterator[None]:
        """Count passes inside of the block."""
        handle = denoiser.register_forward_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, denoiser: nn.Module, args: tuple[object, ...], output: tuple[Tensor, ...] | Prediction) -> None:
        made: Tensor = output[0] if isinstance(output, tuple) else output.sample
        rows = len(made)
        self.forwards += rows
        if torch.is_grad_enabled() and made.requires_grad:
            again = bool(getattr(denoiser, "is_gradient_checkpointing", False))
            made.register_hook(lambda _gradient: self._add(rows * (BACKWARD + again)))

    def _add(self, count: int) -> None:
        self.forwards += count

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count inside of the block, for passes that are not part of the training."""
        before = self.forwards
        yield
        self.forwards = before

    def state_dict(self) -> dict[str, float]:
        """Give the counts and times for checkpoints."""
        self.begin(self._phase)
        times = {f"{phase}_seconds": self.seconds[phase] for phase in PHASES}
        counts = {"forwards": self.forwards, "rollout_forwards": self.rollout_forwards, "sessions": self.sessions}
        return {**counts, **times}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add what earlier sessions have cost.

        Raises:
            TrainingError: A number is invalid.
        """
        if not all(type(n) in (int, float) and math.isfinite(n) and n >= 0 for n in state.values()):
            raise TrainingError(f"a checkpoint says that a training has cost {state}: delete it to start anew")
        self.forwards += int(state["forwards"])
        self.rollout_forwards += int(state["rollout_forwards"])
        self.sessions = int(state["sessions"]) + 1
        self.earlier_seconds = sum(state[f"{phase}_seconds"] for phase in PHASES)
        for phase in PHASES:
            self.seconds[phase] += state[f"{phase}_seconds"]
