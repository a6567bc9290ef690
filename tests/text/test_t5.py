"""Words among the tokens of T5: no start token, marks ahead of words, and a word that is seen from everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasure import Concept
from erasure.backbones import TextTower
from erasure.errors import ConceptError
from erasure.sae.gates import WordStates, locate
from erasure.text.corpora import context_prompts, seeded_prompts, vocabulary, vocabulary_prompts
from erasure.text.words import align, aligned_prompts, paired_at_the_end, subject_span, word_mask
from erasure.training.attack import prefixed


@pytest.fixture(scope="module")
def tower(tiny_t5: Any) -> TextTower:
    encoder, tokenizer = tiny_t5()
    return TextTower("text_encoder_2", encoder, tokenizer, max_length=24)


def pieces(tower: TextTower, prompt: str) -> list[str]:
    return tower.tokenizer.convert_ids_to_tokens(tower.tokenize([prompt]).ids[0].tolist())


def test_the_tower_says_how_it_is_built(tower: TextTower) -> None:
    assert not tower.causal
    assert tower.width == 32
    assert isinstance(tower.root.get_submodule(tower.attention_out(0)), torch.nn.Linear)
    assert tower.root.get_submodule(tower.attention(-1)) is tower.blocks[-1].layer[0].SelfAttention
    assert tower.root.get_submodule(tower.mlp(1)) is tower.blocks[1].layer[1].DenseReluDense
    assert tower.root.get_submodule(tower.norm_path) is tower.module.encoder.final_layer_norm
    assert tower.end == tower.tokenizer.eos_token_id


def test_whole_words_are_those_with_the_mark(tower: TextTower) -> None:
    words = tower.words()
    assert {"cat", "dog", "monet", "a"} <= set(words)
    # A piece that only continues words, and the mark alone.
    assert not {"s", "b", ""} & set(words)
    assert all(tower.word_ids(word) == [index] for word, index in words.items())


@pytest.mark.parametrize(
    ("prompt", "words", "first", "last"),
    [
        ("cat", "cat", 0, 0),
        ("cat, white background", "cat", 0, 0),
        ("cat and a cat", "cat", 3, 3),
        ("a van gogh painting", "van gogh", 1, 2),
        ("a zebra in ink style", "zebra", 1, 6),
    ],
)
def test_a_concept_is_found_from_token_0_on_and_in_several_pieces(
    tower: TextTower, prompt: str, words: str, first: int, last: int
) -> None:
    span = subject_span(tower, prompt, words)
    assert (span.first, span.last) == (first, last)
    assert "".join(pieces(tower, prompt)[first : last + 1]).replace("▁", " ").strip() == words
    # Every other token has seen it.
    assert span.start == 0


@pytest.mark.parametrize("prompt", ['"cat" in ink style', "a photo (cat)", "white/cat"])
def test_a_concept_behind_a_sign_is_found(tower: TextTower, prompt: str) -> None:
    span = subject_span(tower, prompt, "cat")
    assert pieces(tower, prompt)[span.first : span.last + 1] == ["cat"]


@pytest.mark.parametrize("prompt", ["a cats", "a photo of tomcat", "a catdog"])
def test_a_part_of_another_word_is_no_concept(tower: TextTower, prompt: str) -> None:
    with pytest.raises(ConceptError, match="written together with its neighbours"):
        subject_span(tower, prompt, "cat")


@pytest.mark.parametrize(
    ("template", "words", "anchor", "last", "anchor_last"),
    [
        ("{} and a dog", "cat", "dog", 0, 0),
        ("a dog and a {}", "cat", "dog", 4, 4),
        ("a dog and a {} and a dog", "cat", "van gogh", 4, 5),
        ("dog, {} and dog", "cat", "dog", 2, 2),
        ("{}", "van gogh", "monet", 1, 0),
        ('dog "{}" dog', "cat", "dog", 3, 5),
    ],
)
def test_concept_and_anchor_are_those_in_the_template_s_place(
    tower: TextTower, template: str, words: str, anchor: str, last: int, anchor_last: int
) -> None:
    pair = align(tower, template, words, anchor)
    assert (pair.start, pair.last, int(pair.positions[last])) == (0, last, anchor_last)
    asked, answers = pieces(tower, pair.prompt), pieces(tower, pair.anchor_prompt)
    length = len(tower.word_ids(words))
    for position, answer in enumerate(pair.positions.tolist()[:-1]):
        if not last - length < position <= last:
            assert answers[answer] == asked[position], "all other words answer to themselves"


def test_an_empty_anchor_takes_the_first_word_out(tower: TextTower) -> None:
    pair = align(tower, "{} and a dog", "cat", "")
    assert pair.anchor_prompt == "and a dog"
    assert pair.positions[:4].tolist() == [0, 0, 1, 2]


def test_bare_names_are_paired_at_their_ends(tower: TextTower) -> None:
    pair = paired_at_the_end(tower, "{}", "van gogh", "monet")
    assert (pair.start, pair.last) == (0, 1)
    assert pair.positions[1:3].tolist() == [0, 1]
    nothing = paired_at_the_end(tower, "{}", "cat", "")
    assert (nothing.last, int(nothing.positions[0])) == (0, 0)


def test_prompts_about_the_rest_are_of_its_own_words(tower: TextTower) -> None:
    words = vocabulary(tower, [Concept("van gogh", synonyms=("cat",))])
    assert {"dog", "house", "monet"} <= set(words)
    assert not {"van", "gogh", "cat", "a"} & set(words)
    generator = torch.Generator().manual_seed(0)
    random = vocabulary_prompts(words, 20, generator)
    assert len(set(random)) > 10
    assert list(seeded_prompts(tuple(words), 20, 0)) == random
    assert list(seeded_prompts(tuple(words), 20, 1)) != random
    concept = Concept("cat", anchor="dog")
    for pair in context_prompts(tower, concept, words, 20, generator):
        assert pieces(tower, pair.prompt)[pair.last] in ("▁cat", "cat")
    assert len(aligned_prompts(tower, concept)) == len(concept.phrasings())


def test_vectors_stand_ahead_of_the_first_word(tower: TextTower) -> None:
    tokens, place = prefixed(tower, ["cat", "a photo of a dog"], 2)
    assert place.tolist() == [0, 1]
    assert tower.tokenizer.convert_ids_to_tokens(tokens.ids[0, :4].tolist()) == ["▁a", "▁a", "▁cat", "</s>"]


def test_words_ahead_of_a_concept_count_neither_as_with_it_nor_without(tower: TextTower) -> None:
    prompts = ["a photo of cat", "a photo of dog"]
    tokens = tower.tokenize(prompts)
    mask = word_mask(tokens.ids, tower.end, tower.leading)
    ids, owner = tokens.ids[mask], mask.nonzero()[:, 0]
    labels = locate(tower, WordStates(torch.zeros(len(ids), 1), ids, owner, 2), ["cat"])
    assert labels.holds.tolist() == [True, False]
    assert labels.positive.nonzero()[:, 0].tolist() == [3]
    assert labels.negative.tolist() == [False] * 5 + [True] * 5


@torch.no_grad()
def test_what_stands_ahead_depends_on_what_follows(tower: TextTower) -> None:
    """The reason for `Span.start` being 0."""
    states = tower.encode(tower.tokenize(["a photo of cat", "a photo of dog"])).states
    assert (states[0, 0] - states[1, 0]).abs().max() > 1e-4
