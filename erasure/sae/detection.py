"""Which erased concepts a prompt holds, by the gates of feature edits: the autoencoder as a zero-shot classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.carriers.features import FeatureEdit, word_mask
from erasure.sae.stream import activations

CHUNK = 64
"""Prompts encoded at once."""


class Detection(NamedTuple):
    """One concept in one prompt."""

    score: float
    """How much of the concept's features fires together on a word, 0-1."""
    gate: float
    """The least score that opens the gate."""

    @property
    def present(self) -> bool:
        """Whether the concept counts as being in the prompt, and is erased from it."""
        return self.score >= self.gate


@torch.no_grad()
def prompt_scores(tower: TextTower, layer: int, edit: FeatureEdit, prompts: Sequence[str]) -> Tensor:
    """What the gates of an edit see in prompts, `(prompts, concepts)` on the CPU; no edit may be in force."""
    made = []
    placed = edit.to(next(tower.root.parameters()).device)
    for first in range(0, len(prompts), CHUNK):
        tokens = tower.tokenize(prompts[first : first + CHUNK])
        states = activations(tower, layer, tokens).float()
        made.append(placed.scores(placed.latents(states), word_mask(tokens.ids, placed.end)).cpu())
    return torch.cat(made)
