"""What training costs, in passes of the denoiser over one sample: the unit that does not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from erasure.interop.protocols import Prediction

BACKWARD = 2
"""Forward passes that a backward pass counts for, as usual."""


class DenoiserCost:
    """Counts sample-forwards: every row of every call of the denoiser, and `BACKWARD` more when gradients pass it.

    Blocks that gradient checkpointing runs twice count twice.
    """

    def __init__(self) -> None:
        self.forwards = 0

    @contextmanager
    def counting(self, denoiser: nn.Module) -> Iterator[None]:
        """Count inside."""
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
        """Do not count inside: looking at the model is no part of training it."""
        before = self.forwards
        yield
        self.forwards = before

    def state_dict(self) -> dict[str, int]:
        """For checkpoints."""
        return {"forwards": self.forwards}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """From a checkpoint."""
        self.forwards = state["forwards"]
