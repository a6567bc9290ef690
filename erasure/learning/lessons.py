"""One training on pictures: what it works on, what it keeps between updates, and the parts of its updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning
from erasure.learning.player import Taught
from erasure.training.images import NoisedImages
from erasure.training.turns import After


class Batch(NamedTuple):
    """A part of an update."""

    x: Tensor
    """`(rows, channels, h, w)`."""
    t: Tensor
    """`(rows,)`."""
    target: Tensor
    """What is to be predicted, shaped as `x`."""
    prompts: list[str]
    """Prompt of every row."""
    chosen: list[tuple[int, ...]]
    """Numbers of the tokens that each row's prompt names."""
    masks: Tensor
    """`(rows, tokens, h, w)` in 0-1, of the row's picture."""
    weights: Tensor
    """`(rows, 1, h, w)` in 0-1: how much each place counts in the loss of the picture."""
    prior: tuple[Tensor, Tensor, Tensor, Conditioning] | None
    """States, noise levels, targets and encodings of what the model must go on to draw."""


class Balance(After):
    """How badly each token is learned: running means of its losses, a part of checkpoints.

    Args:
        tokens: How many there are.
        gather: Sums a tensor over all processes.
        decay: Share that a running mean keeps.
    """

    def __init__(
        self, tokens: int, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor, decay: float = 0.9
    ) -> None:
        self.losses, self.gather, self.decay = torch.ones(tokens), gather, decay
        self.met = torch.zeros(2, tokens)
        """Sum of the losses of each token in the update under way, and of how many rows."""

    def add(self, token: int, loss: Tensor) -> None:
        """Take note of the loss of a row that names one token alone."""
        self.met = self.met.to(loss.device)
        self.met[:, token] += torch.stack([loss.detach().float(), torch.ones_like(loss)])

    def apply(self, update: int, lr: float) -> None:
        """See `After.apply`: the losses of the update enter the means, those of all processes."""
        sums, rows = self.gather(self.met).cpu()
        fresh = self.decay * self.losses + (1 - self.decay) * sums / rows.clamp_min(1)
        self.losses, self.met = torch.where(rows > 0, fresh, self.losses), torch.zeros_like(self.met)

    def figures(self) -> dict[str, float]:
        """The means."""
        return {f"loss_token_{number}": float(loss) for number, loss in enumerate(self.losses)}

    def state_dict(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return {"losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.losses = state["losses"].clone()


class Places:
    """Where the things are in every picture, a part of checkpoints.

    Args:
        masks: `(pictures, tokens, h, w)` float32 in 0-1, in latent pixels, on the CPU.
        are_known: Whether they are masks of things, and not of whole pictures.
    """

    def __init__(self, masks: Tensor, are_known: bool = True) -> None:
        self.masks, self.are_known = masks, are_known

    def state_dict(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return {"masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.masks = state["masks"].clone()


class Alone(NamedTuple):
    """Each thing cut out of its picture, as large as the model draws single things, before a plain background."""

    clean: Tensor
    """Latents, `(pictures, tokens, channels, h, w)`."""
    masks: Tensor
    """`(pictures, tokens, h, w)` in 0-1, on the CPU."""


@dataclass
class Lesson:
    """One training."""

    backbone: Backbone
    tokens: list[str]
    clean: Tensor
    """Latents of the pictures, `(pictures, channels, h, w)`."""
    inside: Tensor
    """`(pictures, 1, h, w)` in 0-1, on the CPU: what is of the pictures, and not filled up."""
    places: Places
    taught: Taught
    balance: Balance
    prior: NoisedImages | None
    seed: int
    alone: Alone | None = None
    """Each thing by itself; `None` where rows that name one thing see the whole picture."""
