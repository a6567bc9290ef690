"""Random words that must survive are none of what is erased."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import erasure
from erasure import Concept
from erasure.backbones import text_towers
from erasure.concept import numbers
from erasure.text.corpora import vocabulary


@pytest.fixture(scope="module")
def canvas() -> Any:
    return erasure.load_pipeline("canvas-sd", device="cpu")


@pytest.mark.parametrize("concept", [Concept("cat"), Concept("Cat"), Concept("kitten"), Concept("cats")])
def test_no_word_for_the_concept_is_retained(canvas: Any, concept: Concept) -> None:
    (tower,) = text_towers(canvas)
    every = set(vocabulary(tower, ()))
    assert {"cat", "kitten", "dog"} <= every
    left = set(vocabulary(tower, [concept]))
    assert not {"cat", "kitten", "kitty"} & left
    assert every - left <= {form for word in ("cat", "kitten", "kitty", "cats") for form in numbers(word)}


class Tower:
    """A tower of a few words. The first is known as "knife", and embeddings are the rows of a table."""

    pipe = None

    def __init__(self, words: tuple[str, ...], table: torch.Tensor) -> None:
        self.known = words
        self.root = torch.nn.Module()
        self.root.embeddings = torch.nn.Embedding.from_pretrained(table)

    def words(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.known)}

    def word_ids(self, words: str) -> list[int]:
        return [0] if words == "knife" else []


def test_plurals_are_not_retained() -> None:
    tower: Any = Tower(("knife", "knives", "Knife", "fork", "butterflies"), torch.eye(5))
    assert vocabulary(tower, [Concept("knife"), Concept("butterfly")]) == ["fork"]


def test_words_that_cannot_be_told_from_a_concept_are_not_retained() -> None:
    """A learned token's vector lies by the word that it was learned from."""
    table = torch.eye(4)
    table[1] = table[0] + 0.05 * table[3]
    table[2] = table[0] + 0.5 * table[3]
    tower: Any = Tower(("knife", "dagger", "sword", "fork"), table)
    assert vocabulary(tower, [Concept("knife")]) == ["sword", "fork"]
    assert vocabulary(tower, ()) == ["knife", "dagger", "sword", "fork"]
