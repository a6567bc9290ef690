"""The choice of features and the gate of ItD's released code (Tian et al. 2025), apart from how prompts are padded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from erasure.backbones import TextTower
from erasure.carriers.reconstruction import ReconstructionEdit
from erasure.errors import ConceptError
from erasure.options import Presets
from erasure.sae.gates import CHUNK, WordStates, locate, read_words, strongest
from erasure.sae.model import SparseAutoencoder
from erasure.sae.selection import top_sets
from erasure.sae.stream import activations

Statistic = Literal["mean", "greatest", "none"]
"""Statistic by which a gate's threshold is set: mean or largest change over tokens; with `none` the gate is always
open."""
PHRASINGS: Mapping[str, Sequence[str]] = {
    "celebrity": ("A portrait of {}", "An image capturing {} at a public event", "An oil painting of {}",
                  "A sketch of {}", "{} in an official photo"),
    "style": ("Image in the style of {}", "Art inspired by {}", "Painting in the style of {}",
              "A reproduction of art by {}", "A famous artwork by {}"),
    "names": ("{}",),
}  # fmt: skip
"""Prompts that name a concept, by its kind; the four words of nudity are themselves the prompts."""

RELEASED: Mapping[str, object] = {
    "parity": "itd", "mode": "scale", "tau": -8.0, "gate_tau": -8.0, "top": 128, "contexts": 0, "mining_steps": 0,
    "gate_statistic": "mean",
}  # fmt: skip
"""Options that the released code's settings for people, styles and nudity have in common."""
RECIPES: Presets = {
    "released": {**RELEASED, "phrasings": "celebrity", "gate_statistic": "greatest"},
    "released-style": {**RELEASED, "phrasings": "style", "top": 256, "gate_tau": -6.0},
    "released-nudity": {**RELEASED, "phrasings": "names", "gate_statistic": "none"},
}
"""Presets of `ItD` that reproduce the released code."""


@torch.no_grad()
def released_edit(
    tower: TextTower, layer: int, sae: SparseAutoencoder, corpus: WordStates, own: Mapping[str, Sequence[str]], *,
    names: Sequence[str], top: int, tau: float, gate_tau: float, statistic: Statistic,
) -> ReconstructionEdit:  # fmt: skip
    """Make the released code's edit: a difference of top-K sets, the whole reconstruction, one threshold.

    Args:
        tower: The text encoder.
        layer: The block.
        sae: The dictionary.
        corpus: Word states of ordinary prompts.
        own: Prompts that name each concept, by its target.
        names: All names of all concepts; ordinary prompts with one of them are left out.
        top: Number of latents of a prompt that count as active.
        tau: Factor of the chosen latents.
        gate_tau: Factor of the chosen latents while the threshold is set.
        statistic: Statistic that sets the threshold; the gate itself compares the mean.

    Raises:
        ConceptError: A concept has no latent of its own.
    """
    # The k largest latents of a token are used, even if the dictionary has its own thresholds.
    sae = copy.copy(sae)
    sae.config = replace(sae.config, architecture="topk")
    holds = locate(tower, corpus, names).holds
    common = top_sets(strongest(sae, corpus.of(~holds)), top).any(0)
    chosen = torch.zeros(sae.config.d_sae, dtype=torch.bool)
    for target, prompts in own.items():
        found = top_sets(strongest(sae, read_words(tower, layer, prompts)), top).any(0) & ~common
        if not found.any():
            raise ConceptError(
                f"parity='itd': every latent among the {top} largest of a prompt with {target!r} is among those of "
                "some prompt without it: lower 'top', or leave parity out"
            )
        chosen |= found
    part = sae.slice(range(sae.config.d_sae))
    edit = ReconstructionEdit(
        part.w_enc.cpu(), part.b_enc.cpu(), part.w_dec.cpu(), sae.b_dec.detach().cpu(), torch.tensor(sae.config.k),
        torch.where(chosen, tau, 1.0), torch.tensor(0.0), torch.tensor(tower.leading),
        torch.tensor(tower.end),
    )  # fmt: skip
    if statistic == "none":
        return edit
    placed = edit._replace(factor=torch.where(chosen, gate_tau, 1.0)).on(next(tower.root.parameters()).device)
    every = [prompt for prompts in own.values() for prompt in prompts]
    least = torch.inf
    for first in range(0, len(every), CHUNK):
        states = activations(tower, layer, tower.tokenize(every[first : first + CHUNK])).float()
        change = (placed.edited(states) - states).square().mean(2)
        scores = change.mean(1) if statistic == "mean" else change.amax(1)
        least = min(least, scores.min().item())
    return edit._replace(gate=torch.tensor(0.99 * least))
