"""Activations of a text tower as a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure.backbones import TextTower, backbone_for
from erasure.errors import NoMatchingModuleError, OptionError, WrongBaseError
from erasure.sae import SparseAutoencoder
from erasure.sae.quality import quality, reconstructed
from erasure.sae.stream import DatasetPrompts, TokenStream, activations, captured
from erasure.text.words import word_mask

PROMPTS = ["a cat", "a photo of a dog on a white background", "", "van gogh"]


@pytest.fixture
def tower(tiny_pipe: Any) -> TextTower:
    return backbone_for(tiny_pipe).towers[0]


@torch.no_grad()
def test_activations_are_the_hidden_states_of_transformers(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    expected = tower.module(tokens.ids, output_hidden_states=True).hidden_states
    for layer in range(len(tower.blocks) - 1):
        torch.testing.assert_close(activations(tower, layer, tokens), expected[layer + 1], rtol=0, atol=0)


def test_the_tower_is_left_as_it_was(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    before = tower.encode(tokens).states
    TokenStream(tower, 0, PROMPTS, batch_size=2)(0)
    assert torch.equal(tower.encode(tokens).states, before)
    with pytest.raises(RuntimeError), captured(tower.blocks[0]):
        raise RuntimeError
    assert torch.equal(tower.encode(tokens).states, before)


def test_a_step_gives_the_same_tokens_whenever_it_is_asked(tower: TextTower) -> None:
    stream = TokenStream(tower, 0, PROMPTS, batch_size=3, seed=4)
    first, other, again = stream(7), stream(8), TokenStream(tower, 0, PROMPTS, batch_size=3, seed=4)(7)
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert not torch.equal(TokenStream(tower, 0, PROMPTS, batch_size=3, seed=5)(7)[:2], first[:2])


def test_words_and_the_end_are_kept_the_start_is_not(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    mask = word_mask(tokens.ids, tower.end)
    assert mask.sum(1).tolist() == [length - 1 for length in tokens.lengths]
    assert not mask[:, 0].any()
    only = TokenStream(tower, 0, PROMPTS[:1], batch_size=1, pad_share=0)(0)
    torch.testing.assert_close(only, activations(tower, 0, tower.tokenize(PROMPTS[:1]))[0, 1 : tokens.lengths[0]])


@torch.no_grad()
def test_the_pass_ends_at_the_block_whose_output_is_wanted(tower: TextTower) -> None:
    ran: list[int] = []
    handle = tower.blocks[2].register_forward_hook(lambda *given: ran.append(1))
    try:
        activations(tower, 1, tower.tokenize(PROMPTS))
        assert ran == []
        tower.encode(tower.tokenize(PROMPTS))
        assert ran == [1]
    finally:
        handle.remove()


@torch.no_grad()
def test_a_tower_runs_on_reconstructions(tower: TextTower, make_sae: Callable[..., SparseAutoencoder]) -> None:
    sae, tokens = make_sae("jumprelu", d_in=32), tower.tokenize(PROMPTS)
    stock, states = tower.encode(tokens).states, activations(tower, 1, tokens)
    with reconstructed(tower, 1, sae):
        found = tower.encode(tokens).states
        made = tower.module(tokens.ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(made[:, 0], states[:, 0])
    torch.testing.assert_close(made[:, 1:], sae(states[:, 1:]))
    assert not torch.equal(found, stock)
    assert torch.equal(tower.encode(tokens).states, stock)


def make_dataset(tmp_path: Path, count: int = 40) -> Path:
    file = tmp_path / "prompts.csv"
    file.write_text("caption,likes\n" + "".join(f"a cat number {i},{i}\n" for i in range(count)))
    return file


def test_a_dataset_is_read_as_a_stream_and_resumed_anywhere(tower: TextTower, tmp_path: Path) -> None:
    prompts = DatasetPrompts.open(str(make_dataset(tmp_path)), "caption")
    steps = [prompts.draw(step, 8, 0) for step in range(12)]
    # Every row once an epoch, in another order each time.
    epochs = [[prompt for step in part for prompt in step] for part in (steps[:5], steps[5:10])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"a cat number {i}" for i in range(40))
    assert epochs[0] != epochs[1]
    again = DatasetPrompts.open(str(make_dataset(tmp_path)), "caption")
    assert again.draw(7, 8, 0) == steps[7]
    assert again.draw(8, 8, 0) == steps[8]
    assert again.draw(7, 8, 0) == steps[7]
    assert again.draw(7, 8, 1) != steps[7]
    first, second = (TokenStream(tower, 0, source, batch_size=4)(3) for source in (prompts, again))
    assert torch.equal(first, second)
    assert len(TokenStream(tower, 0, prompts, batch_size=4).sample(10)) == 10


def test_a_dataset_without_such_a_column_or_rows_is_refused(tmp_path: Path) -> None:
    file = str(make_dataset(tmp_path))
    with pytest.raises(OptionError, match="no column 'text' of text; there are: caption"):
        DatasetPrompts.open(file)
    with pytest.raises(OptionError, match="no column 'likes' of text"):
        DatasetPrompts.open(file, "likes")
    with pytest.raises(OptionError, match="cannot be opened"):
        DatasetPrompts.open(file, "caption", split="validation")
    with pytest.raises(OptionError, match="no rows"):
        DatasetPrompts([], "caption")


def test_quality_counts_what_both_ways_of_selecting_choose(make_sae: Callable[..., SparseAutoencoder]) -> None:
    sae = make_sae("jumprelu")
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(4))
    before = sae.pre_activations(x)
    both = either = 0
    for row in before.tolist():
        above = {i for i, value in enumerate(row) if value > 0.8}
        largest = {i for i in sorted(range(40), key=lambda i: -row[i])[:5] if row[i] > 0}
        both, either = both + len(above & largest), either + len(above | largest)
    assert quality(sae, lambda step: x, steps=1).topk_agreement == pytest.approx(both / either)
    assert 0 < both < either


def test_a_sample_holds_every_prompt_once(tower: TextTower) -> None:
    assert sorted(TokenStream(tower, 0, PROMPTS, batch_size=3).sample(50)) == sorted(PROMPTS)


def test_a_share_of_the_padding_is_kept(tower: TextTower) -> None:
    whole = TokenStream(tower, 0, PROMPTS[:1], batch_size=8, pad_share=1)(0)
    assert len(whole) == 8 * (tower.max_length - 1)
    words = tower.tokenize(PROMPTS[:1]).lengths[0] - 1
    some = len(TokenStream(tower, 0, PROMPTS[:1], batch_size=64, pad_share=0.1)(0)) / 64
    assert words + 3 < some < words + 12


@pytest.mark.parametrize("layer", [-1, 99])
def test_a_layer_that_is_not_there_is_refused(tower: TextTower, layer: int) -> None:
    with pytest.raises(NoMatchingModuleError, match=f"no block {layer}"):
        TokenStream(tower, layer, PROMPTS)


def test_no_prompts_are_refused(tower: TextTower) -> None:
    with pytest.raises(OptionError, match="prompts"):
        TokenStream(tower, 0, [])


def test_quality_against_plain_arithmetic(make_sae: Callable[..., SparseAutoencoder]) -> None:
    sae = make_sae("jumprelu")
    stream = lambda step: torch.randn(50, 12, generator=torch.Generator().manual_seed(step))  # noqa: E731
    found = quality(sae, stream, 3)
    x = torch.cat([stream(i) for i in range(3)]).double()
    latents = sae.encode(x.float())
    assert found.fvu == pytest.approx(
        float((x - sae.decode(latents)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-4
    )
    assert found.latents_per_token == pytest.approx(float((latents > 0).sum(1).double().mean()))
    assert found.silent == pytest.approx(float((latents == 0).all(0).double().mean()))
    assert found.tokens == 150


def test_a_dictionary_of_another_width_is_refused(make_sae: Callable[..., SparseAutoencoder]) -> None:
    with pytest.raises(WrongBaseError, match="width 12"):
        quality(make_sae(), lambda step: torch.randn(4, 13), 1)
