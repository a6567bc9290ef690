"""Replacements of concepts whose latents are turned off: vectors that produce an anchor's states instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.sae.gates import CHUNK
from erasure.sae.model import SparseAutoencoder
from erasure.sae.stream import activations
from erasure.text.words import AlignedPrompt, telling_places

ALONE = -1.0
"""Factor of the latents of a concept without an anchor."""
PENALTY = 0.01
"""Weight of the squared rows in the fit, for latents in units of their root mean square."""


@torch.no_grad()
def written_instead(
    tower: TextTower, layer: int, sae: SparseAutoencoder, features: list[int], pairs: Sequence[AlignedPrompt]
) -> Tensor:
    """Fit the rows `(features, dim)` that a concept's latents add to produce its anchor.

    With the latents $z$ of the concept at a token $x$, their decoder rows $d$, and $x'$ the corresponding token in the
    same prompt with the anchor, the rows $v$ are a ridge regression of

        x' - (x - sum_i z_i d_i)

    on $z$. Words, the tokens after them, the end token and the padding carry a concept in different ways and fire
    different latents, so each gets its own rows. Nothing is added where no latent of the concept fires.

    Args:
        tower: The text encoder.
        layer: Block of the text encoder.
        sae: The dictionary of that block.
        features: Latents of the concept.
        pairs: Prompts with the concept, aligned with its anchor.
    """
    part = sae.slice(features)
    device = part.w_enc.device
    square = torch.zeros(len(features), len(features), dtype=torch.float64, device=device)
    product = torch.zeros(len(features), part.w_enc.shape[0], dtype=torch.float64, device=device)
    count = 0
    for first in range(0, len(pairs), CHUNK):
        chunk = pairs[first : first + CHUNK]
        prompts, anchors = ([getattr(pair, name) for pair in chunk] for name in ("prompt", "anchor_prompt"))
        states, others = (activations(tower, layer, tower.tokenize(texts)).float() for texts in (prompts, anchors))
        for pair, state, other in zip(chunk, states, others, strict=True):
            places = telling_places(tower, pair.prompt)
            places = places[places >= tower.leading]
            x = state[places].to(device)
            latents = part.encode(x)
            wanted = other[pair.positions[places]].to(device) - x + latents @ part.w_dec.float()
            square += latents.T.double() @ latents.double()
            product += latents.T.double() @ wanted.double()
            count += len(places)
    size = (square.diagonal() / max(count, 1)).sqrt().clamp_min(1e-6)
    square, product = square / (size[:, None] * size * count), product / (size[:, None] * count)
    ridge = PENALTY * torch.eye(len(features), dtype=torch.float64, device=device)
    return (torch.linalg.solve(square + ridge, product) / size[:, None]).float().cpu()
