"""Stand-ins for concepts whose latents are turned off: what the latents of their anchors write."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erasure.sae.model import SparseAutoencoder

LEAST = 0.1
"""Share of its usual value below which a concept does not fire, so that words without it are left alone."""
ALONE = -1.0
"""Factor of the latents of a concept without an anchor."""


class StandIn(NamedTuple):
    """One more latent of an edit. It is 1 where the features of a concept fire as they usually do."""

    w_enc: Tensor
    """`(dim,)`."""
    b_enc: Tensor
    """`()`."""
    w_dec: Tensor
    """`(dim,)`: what the anchor writes."""


def written(sae: SparseAutoencoder, features: list[int], magnitude: Tensor) -> Tensor:
    """Sum what latents write where they fire as they usually do, `(dim,)` on the CPU.

    Args:
        sae: The dictionary.
        features: The latents.
        magnitude: `(features,)`: what each usually reaches.
    """
    return magnitude @ sae.slice(features).w_dec.detach().float().cpu()


def stand_in(sae: SparseAutoencoder, features: list[int], magnitude: Tensor, anchor: Tensor) -> StandIn:
    """The latent that writes an anchor where a concept fires.

    With $z_i$ the features of the concept, before their threshold, and $m_i$ what they usually reach, it is the mean
    of $z_i / m_i$.

    Args:
        sae: The dictionary.
        features: Latents of the concept.
        magnitude: `(features,)`: what each usually reaches.
        anchor: What the anchor writes, `(dim,)`.
    """
    part = sae.slice(features)
    share = 1 / (len(features) * magnitude.clamp_min(1e-6))
    w_enc, b_enc = part.w_enc.detach().float().cpu(), part.b_enc.detach().float().cpu()
    return StandIn(w_enc @ share, b_enc @ share, anchor)


def columns(latents: list[StandIn]) -> dict[str, Tensor]:
    """Stand-ins as the fields of a feature edit, one column each; `w_dec` has rows."""
    count = len(latents)
    return {
        "w_enc": torch.stack([latent.w_enc for latent in latents], 1),
        "b_enc": torch.stack([latent.b_enc for latent in latents]),
        "w_dec": torch.stack([latent.w_dec for latent in latents]),
        "threshold": torch.full((count,), LEAST),
        "gain": torch.ones(count),
        "offset": torch.zeros(count),
    }
