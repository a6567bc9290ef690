"""The parts of a training: players (networks that learn), and turns (their optimiser steps in an update)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor, nn

from erasure.options import CountOrZero, Decay, NotNegative, Options, Positive
from erasure.training.combining import Combine, Total

Output = TypeVar("Output")
Prepared = TypeVar("Prepared")
"""Type of the prepared inputs of an update's losses."""


class Player(nn.Module):
    """A network that learns. Its parameters are the trained tensors, in float32."""

    def forward(self, run: Callable[[], Output]) -> Output:
        """Call `run` while the player's changes are in force in the networks that it changes."""
        return run()


@dataclass(frozen=True, kw_only=True)
class Descent(Options):
    """Settings of the AdamW that trains a player."""

    lr: Positive
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates beta_1 and beta_2 of the running means of gradients and of their squares."""
    eps: Positive = 1e-8
    """Number that is added to the denominator of the step."""
    weight_decay: NotNegative = 0.0
    """Weight decay, which is multiplied by the learning rate."""
    warmup: CountOrZero = 0
    """Number of updates in which the learning rate rises linearly to its peak."""
    cycles: CountOrZero = 0
    """Number of times that the rate falls from its peak to zero after the warm-up, each along half a cosine; 0 for
    a constant rate."""
    clip: NotNegative = 0.0
    """Largest norm of the gradient, to which longer ones are clipped; 0 switches clipping off."""
    ema: Decay = 0.0
    """Decay of the exponential moving average of the weights, which becomes the result; 0 takes the last weights."""


class After(ABC):
    """An action on a player's tensors after each of its optimiser steps."""

    def start(self) -> None:  # noqa: B027
        """Called once before the first update of a training, and not when it is resumed."""

    @abstractmethod
    def apply(self, update: int, lr: float) -> None:
        """Called after each optimiser step, in the order in which the turn lists the actions.

        Args:
            update: Number of the update, counted from 0.
            lr: Learning rate of the step.
        """

    def figures(self) -> dict[str, float]:
        """Give figures to save once the training is done, by name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Turn(Generic[Prepared]):
    """One optimiser step of one player in an update."""

    name: str
    """Name of the player in checkpoints and messages."""
    player: Player
    losses: Callable[[Prepared], dict[str, Tensor]]
    """Computes loss terms, already weighted, from the prepared inputs. Called inside of `Player.forward`. No two
    turns have terms of the same name."""
    descent: Descent
    combine: Combine = field(default_factory=Total)
    """How the gradients of the terms are combined."""
    after: tuple[After, ...] = ()
    since: int = 0
    """First update in which the player takes a step."""
    every: int = 1
    """Number of updates from one step of the player to the next."""
    signed: bool = False
    """Whether losses may be negative or start at 0, so that only NaN and infinity count as divergence."""
    rate: str = "lr"
    """Name of the option that holds the learning rate, for messages."""

    def is_due(self, update: int) -> bool:
        """Whether the player takes a step in an update."""
        return update >= self.since and (update - self.since) % self.every == 0
