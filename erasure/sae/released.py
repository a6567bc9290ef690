"""ItD as the paper's released code finds features and sets its threshold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from erasure.backbones import TextTower
from erasure.carriers.reconstruction import ReconstructionEdit
from erasure.concept import Concept
from erasure.errors import ConceptError
from erasure.sae.gates import CHUNK, WordStates, locate, read_words, strongest
from erasure.sae.model import SparseAutoencoder
from erasure.sae.selection import top_sets
from erasure.sae.stream import activations


@torch.no_grad()
def released(
    tower: TextTower, layer: int, sae: SparseAutoencoder, corpus: WordStates, own: Sequence[list[str]],
    concepts: Sequence[Concept], *, top: int, tau: float,
) -> ReconstructionEdit:  # fmt: skip
    """Features by a difference of top-K sets, the whole reconstruction, one threshold below all target prompts.

    Args:
        tower: The text encoder.
        layer: The block.
        sae: The dictionary.
        corpus: Words of ordinary prompts.
        own: Prompts that name each concept.
        concepts: To erase.
        top: Latents of a prompt that count as active.
        tau: What a latent that is found is multiplied by.

    Raises:
        ConceptError: A concept has no latent to itself.
    """
    # The k largest of a token, also where the dictionary has thresholds of its own.
    sae = copy.copy(sae)
    sae.config = replace(sae.config, architecture="topk")
    holds = locate(tower, corpus, [name for concept in concepts for name in concept.names]).holds
    common = top_sets(strongest(sae, corpus.of(~holds)), top).any(0)
    chosen = torch.zeros(sae.config.d_sae, dtype=torch.bool)
    for prompts, concept in zip(own, concepts, strict=True):
        found = top_sets(strongest(sae, read_words(tower, layer, prompts)), top).any(0) & ~common
        if not found.any():
            raise ConceptError(
                f"parity='itd': every latent among the {top} largest of a prompt with {concept.target!r} is "
                "among those of some prompt without it: lower 'top', or leave parity out"
            )
        chosen |= found
    part = sae.slice(range(sae.config.d_sae))
    edit = ReconstructionEdit(
        part.w_enc.cpu(), part.b_enc.cpu(), part.w_dec.cpu(), sae.b_dec.detach().cpu(),
        torch.tensor(sae.config.k), torch.where(chosen, tau, 1.0), torch.tensor(0.0),
        torch.tensor(tower.leading), torch.tensor(tower.tokenizer.eos_token_id),
    )  # fmt: skip
    placed = edit.on(next(tower.root.parameters()).device)
    least = torch.inf
    for prompts in own:
        for first in range(0, len(prompts), CHUNK):
            tokens = tower.tokenize(prompts[first : first + CHUNK])
            states = activations(tower, layer, tokens).float()
            scores = placed.scores(states, torch.ones(tokens.ids.shape, dtype=torch.bool, device=states.device))
            least = min(least, scores.min().item())
    return edit._replace(gate=torch.tensor(0.99 * least))
