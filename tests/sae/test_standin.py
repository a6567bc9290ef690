"""Stand-ins for concepts whose latents are turned off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erasure.backbones import text_towers
from erasure.sae import standin
from erasure.sae.stream import activations
from erasure.text.words import align

PHRASES = ("a {}", "a photo of a {}", "a {} and a car")
FEATURES = [3, 17, 30, 8]


@pytest.fixture
def sae(tiny_pipe: Any, make_sae: Any) -> Any:
    """Of the tiny text encoder, with latents that fire on its small states."""
    made = make_sae("jumprelu", d_in=text_towers(tiny_pipe)[0].root.config.hidden_size)
    made.threshold.zero_()
    made.b_enc.add_(0.5)
    return made


def test_what_is_written_instead_is_a_ridge_regression_on_every_place_of_the_prompts(
    tiny_pipe: Any, sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standin, "CHUNK", 2)
    tower = text_towers(tiny_pipe)[0]
    pairs = [align(tower, phrase, "cat", "dog") for phrase in PHRASES]
    found = standin.written_instead(tower, 1, sae, FEATURES, pairs)

    latents, wanted = [], []
    for pair in pairs:
        state, other = (
            activations(tower, 1, tower.tokenize([text]))[0].double().numpy()
            for text in (pair.prompt, pair.anchor_prompt)
        )
        for place in range(tower.leading, tower.max_length):
            before = (state[place] - sae.b_dec.numpy()) @ sae.W_enc.double().numpy() + sae.b_enc.numpy()
            fired = np.where(before > sae.threshold.numpy(), before, 0.0)[FEATURES]
            written = fired @ sae.W_dec.double().numpy()[FEATURES]
            latents.append(fired)
            wanted.append(other[int(pair.positions[place])] - (state[place] - written))
    x, y = np.stack(latents), np.stack(wanted)
    size = np.maximum(np.sqrt((x**2).mean(0)), 1e-6)
    x = x / size
    rows = np.linalg.solve(x.T @ x + standin.PENALTY * len(x) * np.eye(len(FEATURES)), x.T @ y) / size[:, None]
    assert (x != 0).any(0).all()
    np.testing.assert_allclose(found.numpy(), rows, rtol=1e-3, atol=1e-4)


def test_a_latent_that_fires_nowhere_writes_nothing(tiny_pipe: Any, sae: Any) -> None:
    tower = text_towers(tiny_pipe)[0]
    sae.threshold[FEATURES[1]] = torch.inf
    rows: Tensor = standin.written_instead(tower, 1, sae, FEATURES, [align(tower, PHRASES[0], "cat", "dog")])
    assert rows.isfinite().all()
    assert not rows[1].any()
    assert rows[0].any()
