"""Where a concept stands in a prompt, what its anchor's tokens are, and prompts without its words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasure import Concept
from erasure.backbones import TextTower, backbone_for
from erasure.errors import ConceptError
from erasure.text.corpora import context_prompts, vocabulary
from erasure.text.words import align, aligned_prompts, subject_span, without


@pytest.fixture
def tower(tiny_pipe_original: Any) -> TextTower:
    return backbone_for(tiny_pipe_original).towers[0]


def words_at(tower: TextTower, prompt: str) -> list[str]:
    ids = tower.tokenizer(prompt, padding="max_length", max_length=77).input_ids
    return tower.tokenizer.convert_ids_to_tokens(ids)


def test_multi_word_concepts_align(tower: TextTower) -> None:
    pair = align(tower, "a photo of {} in ink style", "van gogh", "monet")
    assert pair.prompt == "a photo of van gogh in ink style"
    assert pair.anchor_prompt == "a photo of monet in ink style"
    erased, anchor = words_at(tower, pair.prompt), words_at(tower, pair.anchor_prompt)
    assert erased[pair.start] == "gogh</w>"
    answers = [anchor[int(position)] for position in pair.positions]
    assert answers[: pair.start - 1] == erased[: pair.start - 1]
    assert answers[pair.start - 1 : pair.start + 1] == ["monet</w>", "monet</w>"]
    assert answers[pair.start + 1 :] == erased[pair.start + 1 :]


def test_a_longer_anchor_aligns(tower: TextTower) -> None:
    pair = align(tower, "a {} and a dog", "cat", "white blue car")
    anchor = words_at(tower, pair.anchor_prompt)
    answers = [anchor[int(position)] for position in pair.positions]
    assert answers[pair.start] == "car</w>"
    assert answers[pair.start + 1 : pair.start + 4] == ["and</w>", "a</w>", "dog</w>"]
    assert int(pair.positions.max()) <= 76


def test_an_empty_anchor_takes_the_words_out(tower: TextTower) -> None:
    pair = align(tower, "a photo of a {} and a dog", "cat", "")
    assert pair.anchor_prompt == "a photo of a and a dog"
    anchor = words_at(tower, pair.anchor_prompt)
    answers = [anchor[int(position)] for position in pair.positions]
    assert answers[pair.start : pair.start + 3] == ["and</w>", "and</w>", "a</w>"]


def test_the_last_occurrence_counts(tower: TextTower) -> None:
    assert subject_span(tower, "a cat and a cat", "cat") == (5, 5, 5)
    assert subject_span(tower, "van gogh", "van gogh") == (1, 2, 2)
    with pytest.raises(ValueError, match="not found among the tokens"):
        subject_span(tower, "a cats", "cat")
    with pytest.raises(ValueError, match="longer than 77"):
        subject_span(tower, "a " * 90 + "cat", "cat")


def test_every_phrasing_of_every_synonym_is_aligned(tower: TextTower) -> None:
    pairs = aligned_prompts(tower, Concept("cat", anchor="animal", synonyms=("kitten",)))
    assert len(pairs) == 10
    for pair in pairs:
        assert pair.anchor_prompt == pair.prompt.replace("kitten", "animal").replace("cat", "animal")


def test_the_vocabulary_leaves_the_concept_out(tower: TextTower) -> None:
    words = vocabulary(tower, [Concept("van gogh", synonyms=("cat",))])
    assert {"dog", "house", "monet"} <= set(words)
    assert not {"van", "gogh", "cat"} & set(words)
    assert all(len(word) > 1 for word in words)


ELSEWHERE = [
    ("a {} and a dog", "cat", "dog", 2, 2),
    ("a dog and a {}", "cat", "dog", 5, 5),
    ("a dog and a {} and a dog", "cat", "dog", 5, 5),
    ("a cat and a {} and a cat", "cat", "dog", 5, 5),
    ("{} and a cat", "cat", "van gogh", 1, 2),
    ("van gogh and {} and van gogh", "monet", "van gogh", 4, 5),
    ("a gogh, {} and van gogh", "monet", "gogh", 4, 4),
]
"""Phrasing, concept, anchor, position of the concept's last token, and of the anchor's."""


@pytest.mark.parametrize(("template", "words", "anchor", "last", "anchor_last"), ELSEWHERE)
def test_concept_and_anchor_are_those_in_the_template_s_place(
    tower: TextTower, template: str, words: str, anchor: str, last: int, anchor_last: int
) -> None:
    """Also where either word stands elsewhere in the phrasing."""
    pair = align(tower, template, words, anchor)
    assert (pair.start, pair.last, int(pair.positions[last])) == (last, last, anchor_last)
    asked, answers = words_at(tower, pair.prompt), words_at(tower, pair.anchor_prompt)
    for position, answer in enumerate(pair.positions.tolist()[:-2]):
        if not last - len(words.split()) < position <= last:
            assert answers[answer] == asked[position], "all other words answer to themselves"


def test_random_company_of_the_anchor_s_own_name_misleads_nothing(tower: TextTower) -> None:
    concept = Concept("cat", anchor="dog")
    for pair in context_prompts(tower, concept, ["dog", "cat"], 40, torch.Generator().manual_seed(0)):
        asked, answers = words_at(tower, pair.prompt), words_at(tower, pair.anchor_prompt)
        differing = [i for i, word in enumerate(asked) if answers[int(pair.positions[i])] != word]
        assert differing == [pair.last]


@pytest.mark.parametrize("template", ["a cat and a pre{}", "a {}s and a cat"])
def test_words_that_merge_with_a_neighbour_are_refused_though_they_stand_elsewhere(
    tower: TextTower, template: str
) -> None:
    with pytest.raises(ConceptError, match="not found among the tokens"):
        align(tower, template, "cat", "dog")


WITHOUT = [
    ("a cartoon of a car", ["car"], "a cartoon of a"),
    ("a car in a cartoon about a scar", ["car"], "a in a cartoon about a scar"),
    ("a Car and a CAR", ["car"], "a and a"),
    ("Van Gogh", ["van gogh"], ""),
    ("by van  gogh", ["van gogh"], "by"),
    ("a kitten and a cat", ["cat", "kitten"], "a and a"),
    ("catalogue of cats", ["cat"], "catalogue of cats"),
    ("a cat's tail, a cat-like cat.", ["cat"], "a 's tail, a -like ."),
    ("a photo of <my-pet>, outside", ["<my-pet>"], "a photo of , outside"),
    ("c++ code and c", ["c++"], "code and c"),
    ("\u68b5\u9ad8\u7684\u753b", ["\u68b5\u9ad8"], "\u7684\u753b"),
    ("\u041a\u043e\u0442 \u0438 \u043a\u043e\u0442\u043b\u0435\u0442\u0430", ["\u043a\u043e\u0442"],
     "\u0438 \u043a\u043e\u0442\u043b\u0435\u0442\u0430"),
    ("van gogh, by gogh", ["gogh", "van gogh"], ", by"),
    ("a dog", ["cat"], "a dog"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "names", "left"), WITHOUT)
def test_words_are_taken_out_whole_and_wherever_they_stand(prompt: str, names: list[str], left: str) -> None:
    assert without(prompt, Concept(names[0], synonyms=tuple(names[1:]))) == left
