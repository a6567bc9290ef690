"""One training on pictures: its inputs, its state between updates, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning
from erasure.learning.player import LearnedTensors
from erasure.training.images import NoisedImages
from erasure.training.turns import After


class Batch(NamedTuple):
    """One process's rows of an update."""

    x: Tensor
    """Noised latents, `(rows, channels, h, w)`."""
    t: Tensor
    """Timesteps, `(rows,)`."""
    target: Tensor
    """Targets, shaped as `x`."""
    prompts: list[str]
    """Prompt of every row."""
    chosen: list[tuple[int, ...]]
    """Indices of the tokens in each row's prompt."""
    masks: Tensor
    """Masks of the row's picture, `(rows, tokens, h, w)` in 0-1."""
    weights: Tensor
    """Weight of each place in the loss, `(rows, 1, h, w)` in 0-1."""
    prior: tuple[Tensor, Tensor, Tensor, Conditioning] | None
    """Prior rows, which must survive: latents, timesteps, targets and encodings."""


class Balance(After):
    """Running means of each token's loss, which are saved in checkpoints.

    Args:
        tokens: Number of tokens.
        gather: Sums a tensor over all processes.
        decay: Decay of the running means.
    """

    def __init__(
        self, tokens: int, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor, decay: float = 0.9
    ) -> None:
        self.losses, self.gather, self.decay = torch.ones(tokens), gather, decay
        self.met = torch.zeros(2, tokens)
        """Sum of the losses of each token in the current update, and number of rows."""

    def add(self, token: int, loss: Tensor) -> None:
        """Record the loss of a row that names only one token."""
        self.met = self.met.to(loss.device)
        self.met[:, token] += torch.stack([loss.detach().float(), torch.ones_like(loss)])

    def apply(self, update: int, lr: float) -> None:
        """Add the losses of the update, from all processes, to the means; see `After.apply`."""
        sums, rows = self.gather(self.met).cpu()
        fresh = self.decay * self.losses + (1 - self.decay) * sums / rows.clamp_min(1)
        self.losses, self.met = torch.where(rows > 0, fresh, self.losses), torch.zeros_like(self.met)

    def figures(self) -> dict[str, float]:
        """Give the means."""
        return {f"loss_token_{number}": float(loss) for number, loss in enumerate(self.losses)}

    def state_dict(self) -> dict[str, Tensor]:
        """Give the state for checkpoints."""
        return {"losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state."""
        self.losses = state["losses"].clone()


class Places:
    """Masks of the things in every picture, which are saved in checkpoints.

    Args:
        masks: Masks in latent pixels on the CPU, `(pictures, tokens, h, w)` float32 in 0-1.
        are_known: Whether they are masks of things, and not of whole pictures.
    """

    def __init__(self, masks: Tensor, are_known: bool = True) -> None:
        self.masks, self.are_known = masks, are_known

    def state_dict(self) -> dict[str, Tensor]:
        """Give the state for checkpoints."""
        return {"masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state."""
        self.masks = state["masks"].clone()


class CutOuts(NamedTuple):
    """Each thing cut out of its picture, as large as the model draws single things, before a plain background."""

    clean: Tensor
    """Latents, `(pictures, tokens, channels, h, w)`."""
    masks: Tensor
    """Masks on the CPU, `(pictures, tokens, h, w)` in 0-1."""


@dataclass
class PictureTraining:
    """The inputs and the state of one training."""

    backbone: Backbone
    tokens: list[str]
    clean: Tensor
    """Latents of the pictures, `(pictures, channels, h, w)`."""
    inside: Tensor
    """Mask of the pictures themselves without padding, `(pictures, 1, h, w)` in 0-1 on the CPU."""
    places: Places
    taught: LearnedTensors
    balance: Balance
    prior: NoisedImages | None
    seed: int
    alone: CutOuts | None = None
    """Each thing cut out; `None` where rows that name one thing use the whole picture."""
