"""Which erased concepts a prompt holds, by the gates of feature edits: the autoencoder as a zero-shot classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from erasure.backbones import TextTower
from erasure.carriers.features import BlockEdit, GatedEdit, word_mask
from erasure.sae.gates import CHUNK
from erasure.sae.stream import activations


class Detection(NamedTuple):
    """One concept in one prompt."""

    score: float
    """How surely a word of the prompt holds the concept, 0-1 (a mean square with `parity="itd"`)."""
    gate: float
    """The least score that opens the gate."""
    probe: float | None = None
    """The same by the linear probe."""

    @property
    def present(self) -> bool:
        """Whether the concept counts as being in the prompt, and is erased from it."""
        return self.score >= self.gate


@torch.no_grad()
def detect(tower: TextTower, layer: int, edit: BlockEdit, prompts: Sequence[str]) -> list[list[Detection]]:
    """What the gates of an edit say of prompts, for each prompt and gate; no edit may be in force."""
    placed = edit.on(next(tower.root.parameters()).device)
    gates = edit.gates.tolist()
    found: list[list[Detection]] = []
    for first in range(0, len(prompts), CHUNK):
        tokens = tower.tokenize(prompts[first : first + CHUNK])
        states = activations(tower, layer, tokens).float()
        words = word_mask(tokens.ids, placed.end, placed.first)
        scores = placed.scores(states, words).tolist()
        probes: list[list[float | None]] = [[None] * len(row) for row in scores]
        if isinstance(placed, GatedEdit):
            probes = placed.scores(states, words, by_probe=True).tolist()
        found += [
            [Detection(*each) for each in zip(row, gates, asked, strict=True)]
            for row, asked in zip(scores, probes, strict=True)
        ]
    return found
