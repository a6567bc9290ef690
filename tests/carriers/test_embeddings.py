"""Learned vectors in place of words, on the tiny pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasure.backbones import TextTower, backbone_for
from erasure.carriers.embeddings import injected
from erasure.interop import paths

PROMPTS = ["a photo of a cat", "a dog"]
PLACE = torch.tensor([1, 2])


@pytest.fixture
def tower(tiny_pipe: Any) -> TextTower:
    return backbone_for(tiny_pipe).towers[0]


@torch.no_grad()
def test_a_token_s_own_embedding_changes_nothing(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    table = paths.token_table(tower.root).weight
    stock = tower.encode(tokens).states
    with injected(tower, PLACE, table[tokens.ids[:, PLACE]]):
        torch.testing.assert_close(tower.encode(tokens).states, stock)
    with injected(tower, PLACE, table[tokens.ids[0, PLACE]]):
        mixed = tower.encode(tokens).states
    torch.testing.assert_close(mixed[0], stock[0])
    assert not torch.equal(mixed[1], stock[1])
    assert torch.equal(tower.encode(tokens).states, stock)


def test_the_vectors_get_a_gradient_and_the_table_none(tower: TextTower) -> None:
    table = paths.token_table(tower.root).weight
    vectors = torch.zeros(2, table.shape[1], requires_grad=True)
    with injected(tower, PLACE, vectors):
        tower.encode(tower.tokenize(PROMPTS)).states.square().sum().backward()
    assert (vectors.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]
    assert table.grad is None


def test_an_error_inside_takes_them_off(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock = tower.encode(tokens).states
    with pytest.raises(ValueError, match="inside"), injected(tower, PLACE, torch.zeros(2, 32)):
        raise ValueError("inside")
    assert torch.equal(tower.encode(tokens).states, stock)
