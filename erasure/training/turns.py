"""What a training consists of: players that learn, and the turns in which each takes its optimiser steps."""

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
"""What an update's losses need of a part of its batch."""


class Player(nn.Module):
    """What learns: its parameters are the tensors that are trained, in float32."""

    def forward(self, run: Callable[[], Output]) -> Output:
        """What `run` gives while the player takes part in the networks that it changes."""
        return run()


@dataclass(frozen=True, kw_only=True)
class Descent(Options):
    """How AdamW trains a player."""

    lr: Positive
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decays of the running means of gradients and of their squares."""
    eps: Positive = 1e-8
    """What is added to the root of the mean square."""
    weight_decay: NotNegative = 0.0
    """Decay of the weights, times the learning rate."""
    warmup: CountOrZero = 0
    """Updates of linear warm-up."""
    cycles: CountOrZero = 0
    """Times that the rate falls from its peak to zero behind the warm-up, along half a cosine each; 0 for a constant
    rate."""
    clip: NotNegative = 0.0
    """Greatest norm of the gradient; 0 for none."""
    ema: Decay = 0.0
    """Decay of the running mean of the weights that becomes the result; 0 takes the last weights."""


class After(ABC):
    """What is done to a player's tensors behind each of its optimiser steps."""

    def start(self) -> None:  # noqa: B027
        """Called once ahead of the first update of a training, and not where it goes on from a checkpoint."""

    @abstractmethod
    def apply(self, update: int, lr: float) -> None:
        """Called behind each step, in the order in which a turn names them.

        Args:
            update: Number of the update, from 0 on.
            lr: Learning rate of the step.
        """

    def figures(self) -> dict[str, float]:
        """What is worth keeping of it once a training is done, by name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Turn(Generic[Prepared]):
    """One optimiser step of one player in an update."""

    name: str
    """Of the player, in checkpoints and messages."""
    player: Player
    losses: Callable[[Prepared], dict[str, Tensor]]
    """Loss terms of what was prepared, each already weighted. Called inside of `Player.forward`; no two turns give
    terms of the same name."""
    descent: Descent
    combine: Combine = field(default_factory=Total)
    """How the gradients of the terms become one."""
    after: tuple[After, ...] = ()
    since: int = 0
    """First update in which the player has its turn."""
    every: int = 1
    """Updates from one turn of the player to the next."""
    signed: bool = False
    """Whether losses may be negative or start at 0, so that only NaN and infinity tell of a divergence."""
    rate: str = "lr"
    """Name of the option that holds the learning rate, for messages."""

    def is_due(self, update: int) -> bool:
        """Whether the player takes a step in an update."""
        return update >= self.since and (update - self.since) % self.every == 0
