"""Stand-ins for concepts whose latents are turned off."""

from __future__ import annotations

from typing import Any

import torch

from erasure.sae.standin import columns, stand_in, written


def test_a_stand_in_writes_the_anchor_where_the_concept_fires_as_usual(make_sae: Any) -> None:
    sae = make_sae("jumprelu")
    features, magnitude = [3, 17, 30], torch.tensor([1.0, 2.0, 4.0])
    state = torch.randn(12, generator=torch.Generator().manual_seed(2))
    anchor = written(sae, [5, 6], torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(anchor, 2 * sae.W_dec[5] + 0.5 * sae.W_dec[6])
    latent = stand_in(sae, features, magnitude, anchor)
    before = ((state - sae.b_dec) @ sae.W_enc + sae.b_enc)[features]
    torch.testing.assert_close(state @ latent.w_enc + latent.b_enc, (before / magnitude).mean())
    fields = columns([latent, latent])
    assert fields["w_enc"].shape == (12, 2)
    assert fields["w_dec"].shape == (2, 12)
    assert fields["gain"].tolist() == [1, 1]
