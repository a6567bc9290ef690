"""Labelled words, logistic scores and thresholds, against plain counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasure.backbones import TextTower, backbone_for
from erasure.sae.gates import (
    Labels,
    WordStates,
    area,
    calibrate,
    fit_gate,
    halves,
    joined,
    locate,
    logistic,
    most_telling,
    read_words,
    roc,
    strongest,
    with_mined,
)
from erasure.sae.stream import activations

PROMPTS = ["a photo of a cat", "", "a van gogh painting of a cat and a dog", "a dog", "van", "a gogh van"]


@pytest.fixture
def tower(tiny_pipe: Any) -> TextTower:
    return backbone_for(tiny_pipe).towers[0]


@pytest.fixture
def words(tower: TextTower) -> WordStates:
    return read_words(tower, 1, PROMPTS)


def test_words_are_those_of_each_prompt(tower: TextTower, words: WordStates) -> None:
    assert words.prompts == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        tokens = tower.tokenize([prompt])
        alone = activations(tower, 1, tokens)[0, 1 : tokens.lengths[0]]
        assert words.ids[words.prompt == row].tolist() == tokens.ids[0, 1 : tokens.lengths[0]].tolist()
        torch.testing.assert_close(words.states[words.prompt == row], alone)


def test_prompts_can_be_taken_out_and_joined(words: WordStates) -> None:
    chosen = torch.tensor([True, False, False, True, False, False])
    some = words.of(chosen)
    assert some.prompts == 2
    assert some.prompt.unique().tolist() == [0, 1]
    assert torch.equal(some.states, torch.cat([words.states[words.prompt == i] for i in (0, 3)]))
    both = joined([some, words])
    assert both.prompts == 2 + len(PROMPTS)
    assert torch.equal(both.prompt[len(some.ids) :], words.prompt + 2)


def test_the_greatest_of_each_prompt(words: WordStates) -> None:
    found = words.greatest(words.states)
    for row in range(len(PROMPTS)):
        assert torch.equal(found[row], words.states[words.prompt == row].amax(0))
    assert torch.equal(words.greatest(words.states[:, 0]), found[:, 0])


def test_mentions_are_found_as_the_tokeniser_spells_them(tower: TextTower, words: WordStates) -> None:
    found = locate(tower, words, ["cat"])
    assert found.holds.tolist() == [True, False, True, False, False, False]
    cat = tower.tokenizer("cat", add_special_tokens=False).input_ids[0]
    assert torch.equal(found.positive, words.ids == cat)
    # Words ahead of the mention, and all of the prompts without it.
    first = words.ids[found.negative & (words.prompt == 0)].tolist()
    assert first == tower.tokenizer("a photo of a", add_special_tokens=False).input_ids
    assert found.negative[words.prompt == 3].all()
    assert not (found.negative & found.positive).any()


def test_a_mention_of_a_learned_token_ends_with_its_last_vector(tiny_pipe: Any, tower: TextTower, teach: Any) -> None:
    teach(tiny_pipe, "a", "cat", "a")
    ids = tower.word_ids("<my-pet>")
    words = read_words(tower, 1, ["a photo of <my-pet> and a dog", "a photo of a dog", "<my-pet>"])
    found = locate(tower, words, ["<my-pet>"])
    assert len(ids) == 3
    assert found.holds.tolist() == [True, False, True]
    assert torch.equal(found.positive, words.ids == ids[-1])
    assert not (found.negative & torch.isin(words.ids, torch.tensor(ids))).any()


def test_several_names_of_several_tokens(tower: TextTower, words: WordStates) -> None:
    found = locate(tower, words, ["van gogh", "dog"])
    assert found.holds.tolist() == [False, False, True, True, False, False]
    assert found.positive[words.prompt == 2].sum() == 2
    # "van" at the end of a prompt and "gogh" at the start of the next are no mention.
    assert not locate(tower, words, ["van a gogh"]).holds.any()


def test_the_regression_finds_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    y = (
        x @ torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64) + 0.3 * torch.randn(300, generator=generator)
        > 0.8
    )
    weight, bias = logistic(x, y, 1e-2)
    share = torch.where(y, 0.5 / y.sum(), 0.5 / (~y).sum())
    wrong = share * (torch.sigmoid(x @ weight + bias) - y.double())
    # The gradient of the balanced loss with its penalty, written out, is zero.
    assert (x.T @ wrong + 2 * 1e-2 * weight).abs().max() < 1e-5
    assert wrong.sum().abs() < 1e-5


def test_the_gate_stands_a_fifth_of_the_way_into_the_gap() -> None:
    target, retain = torch.tensor([0.8, 0.8, 0.9]), torch.tensor([0.0, 0.1, 0.2])
    assert calibrate(target, retain, 0.01) == pytest.approx(0.32, abs=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.5])
def test_no_more_false_positives_than_asked_for(rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    target, retain = torch.randn(200, generator=generator) + 1, torch.randn(1000, generator=generator)
    gate = calibrate(target, retain, rate)
    opened = float((retain >= gate).double().mean())
    assert opened <= rate
    assert opened >= rate - 0.002


def test_ties_open_no_gate_together() -> None:
    assert calibrate(torch.zeros(3), torch.zeros(4), 0.01) > 0
    assert calibrate(torch.ones(3), torch.tensor([0.0, 0.0, 0.7, 0.7]), 0.3) > 0.7


def test_area_under_the_curve_is_the_share_of_right_pairs() -> None:
    assert area(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_the_curve_counts_what_is_above_each_level() -> None:
    target, retain = torch.tensor([0.5, 1.5, 2.5, 3.5]), torch.arange(1000) / 250
    curve = dict(roc(target, retain))
    assert curve[0.1] == 0.0
    assert curve[0.2] == 0.25
    assert curve[0.5] == 0.5
    assert list(curve.values()) == sorted(curve.values())


def test_a_half_of_each_kind_chooses() -> None:
    flags = torch.zeros(9, dtype=torch.bool)
    for with_concept in (1, 4, 5):
        holds = torch.arange(9) < with_concept
        chooses = halves(Labels(holds, flags, flags), torch.Generator().manual_seed(0))
        assert int((chooses & holds).sum()) == (with_concept + 1) // 2
        assert int((chooses & ~holds).sum()) == (9 - with_concept + 1) // 2


def test_a_gate_is_fitted_even_to_one_prompt(tower: TextTower, words: WordStates, make_sae: Any) -> None:
    labels = locate(tower, words, ["gogh van"])
    assert labels.holds.sum() == 1
    chooses = halves(labels, torch.Generator().manual_seed(0))
    gate = fit_gate(make_sae("jumprelu", d_in=32), words, labels, chooses, votes=4, rate=0.01)
    assert len(gate.features) == 4
    assert gate.figures["prompts_with"] == 1
    assert gate.figures["probe"]["tpr"] == 1.0
    assert torch.isfinite(torch.tensor([gate.level, gate.bias, gate.probe_level, *gate.weight.tolist()])).all()


def test_the_greatest_of_each_prompt_is_taken(make_sae: Any) -> None:
    sae = make_sae("jumprelu")
    states = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    words = WordStates(states, torch.arange(7), torch.tensor([0, 0, 0, 2, 2, 3, 3]), 4)
    latents = sae.encode(states)
    expected = [latents[:3].amax(0), torch.zeros(40), latents[3:5].amax(0), latents[5:].amax(0)]
    torch.testing.assert_close(strongest(sae, words), torch.stack(expected))


def test_what_differs_most_is_most_telling(make_sae: Any) -> None:
    sae = make_sae("jumprelu")
    states = torch.randn(300, 12, generator=torch.Generator().manual_seed(2))
    latents = sae.encode(states)
    y = latents[:, 17] > latents[:, 17].quantile(0.8)
    assert most_telling(sae, states, y)[0] == 17


def test_mined_words_count_as_the_concept() -> None:
    words = WordStates(torch.zeros(3, 4), torch.arange(3), torch.tensor([0, 0, 1]), 2)
    flags = lambda *values: torch.tensor(values, dtype=torch.bool)  # noqa: E731
    labels = Labels(flags(1, 0), flags(0, 1, 0), flags(1, 0, 1))
    mined = WordStates(torch.ones(2, 4), torch.arange(2), torch.tensor([0, 0]), 1)
    both, found = with_mined(words, labels, mined, flags(0, 1))
    assert both.prompts == 3
    assert both.prompt.tolist() == [0, 0, 1, 2, 2]
    assert found.holds.tolist() == [True, False, True]
    assert found.positive.tolist() == [False, True, False, False, True]
    assert found.negative.tolist() == [True, False, True, False, False]


def test_words_of_t5_are_whole_words(tiny_t5: Any) -> None:
    """Its tokens mark where a word begins; a word in brackets is spelled in another way, and "cats" begins with it."""
    encoder, tokenizer = tiny_t5()
    tower = TextTower("text_encoder_2", encoder, tokenizer, 32)
    prompts = ["cat", "cats and a dog", "a (cat)", "a dog", "a cat, a dog", "the cat", "kitten cats cat"]
    words = read_words(tower, 1, prompts)
    labels = locate(tower, words, ["cat"])
    assert labels.holds.tolist() == [True, False, True, False, True, True, True]
    spelled = [tokenizer.convert_ids_to_tokens([i])[0] for i in words.ids[labels.positive].tolist()]
    assert [piece.lstrip("▁") for piece in spelled] == ["cat"] * 5
    assert words.prompt[labels.positive].tolist() == [0, 2, 4, 5, 6]
    # Attention goes both ways, so every word of a prompt with it may carry it.
    assert torch.equal(labels.negative, ~labels.holds[words.prompt])
