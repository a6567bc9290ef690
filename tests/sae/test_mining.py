"""Adversarial feature mining on the tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.itd import random_edit
from erasure import Concept
from erasure.backbones import Backbone, backbone_for
from erasure.carriers.features import EditedFeatures, FeatureEdit
from erasure.errors import DivergenceError
from erasure.sae import mining
from erasure.sae.mining import TOKENS, learned_places, mine

KEY = "text_encoder/encoder.layers.1"
CAT = Concept("cat")


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "IMAGES", 3)


@pytest.fixture
def backbone(tiny_pipe: Any) -> Backbone:
    return backbone_for(tiny_pipe)


@pytest.fixture
def edit(backbone: Backbone, make_sae: Callable[..., Any]) -> FeatureEdit:
    made = random_edit(make_sae("jumprelu", d_in=32), 1, 6, 6, torch.Generator().manual_seed(0))
    return made._replace(end=torch.tensor(backbone.towers[0].tokenizer.eos_token_id))


def test_learned_tokens_stand_where_the_concept_stood(backbone: Backbone) -> None:
    tower = backbone.towers[0]
    for phrase, start in (("a a a a", 1), ("a photo of a a a a a", 5), ("a a a a on a background", 1)):
        assert learned_places(tower, phrase).tolist() == list(range(start, start + TOKENS))


def test_mining_gives_learned_words_and_leaves_the_model_as_it_was(backbone: Backbone, edit: FeatureEdit) -> None:
    shares: list[float] = []
    tower = backbone.towers[0]
    before = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    backbone.denoiser.requires_grad_(True)
    found = mine(backbone, CAT, KEY, edit, 6, 0, shares.append)
    assert shares == pytest.approx([(step + 1) / 6 for step in range(6)])
    assert found.states.prompts == 6
    assert [int(found.learned[found.states.prompt == row].sum()) for row in range(6)] == [TOKENS] * 6
    first, second = (found.states.states[found.states.prompt == row] for row in (0, 1))
    assert not torch.equal(first, second)
    assert EditedFeatures.is_written(tower.module, {})
    assert all(torch.equal(before[name], value) for name, value in backbone.denoiser.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.denoiser.parameters())
    again = mine(backbone, CAT, KEY, edit, 6, 0, lambda share: None)
    assert torch.equal(found.states.states, again.states.states)
    assert found.states.states.isfinite().all()


def test_nan_is_refused(backbone: Backbone, edit: FeatureEdit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backbone), "predict", lambda self, x, t, conditioning: x * torch.nan)
    with pytest.raises(DivergenceError, match="at step 0"):
        mine(backbone, CAT, KEY, edit, 2, 0, lambda share: None)
