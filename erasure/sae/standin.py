"""Stand-ins for concepts whose latents are turned off: what the latents of their anchors write."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.carriers.features import EditedFeatures, FeatureEdit, word_mask
from erasure.concept import Concept
from erasure.sae.model import SparseAutoencoder

LEAST = 0.1
"""Share of its usual value below which a concept does not fire, so that words without it are left alone."""
PUSH = -1.0
"""Factor of the latents of a concept with an anchor."""
ALONE = -10.0
"""Factor of the latents of a concept without an anchor."""
FAR = 0.6
"""Least distance by which an edit must move a concept's prompts, in units of how far away the anchor's are. On the
embedded model, prompts that moved by 0.4 still drew the concept, those that moved by 0.7 and more did not."""
WHOLE = 0.75
"""Share of `ItD.anchored` that the difference of the states is multiplied by, where it stands in for latents."""


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


@torch.no_grad()
def moved(tower: TextTower, layer: int, edit: FeatureEdit, concept: Concept, anchor: str) -> float:
    """Measure how far an edit moves what the denoiser reads of a concept's prompts.

    The mean length of the change over the words of all phrasings, over that of the change when the anchor's name is
    put in the place of the concept's.

    Args:
        tower: The text encoder, which is left as it was.
        layer: The block that is edited.
        edit: The edit.
        concept: The concept.
        anchor: The words that take its place.
    """
    forms = concept.phrasings()
    own, other = (tower.tokenize([form.format(word) for form in forms]) for word in (concept.target, anchor))
    before, wanted = tower.encode(own), tower.encode(other)
    EditedFeatures.write(tower.module, {tower.block_path(layer): [(1.0, edit)]})
    try:
        after = tower.encode(own)
    finally:
        EditedFeatures.write(tower.module, {})
    words = word_mask(own.ids, tower.tokenizer.eos_token_id, tower.leading)
    made, needed = ((states - before)[words].float().norm(dim=-1).mean() for states in (after, wanted))
    return float(made / needed.clamp_min(1e-6))
