"""Random words that must survive are none of what is erased."""

from __future__ import annotations

from typing import Any

import pytest

import erasure
from erasure import Concept
from erasure.backbones import text_towers
from erasure.concept import numbers
from erasure.strategies.prompts import vocabulary


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


def test_plurals_are_not_retained() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {
                f"{word}</w>": number
                for number, word in enumerate(("knife", "knives", "Knife", "fork", "butterflies"))
            }

    class Tower:
        pipe, tokenizer = None, Tokenizer()

        def word_ids(self, words: str) -> list[int]:
            return [0] if words == "knife" else []

    tower: Any = Tower()
    assert vocabulary(tower, [Concept("knife"), Concept("butterfly")]) == ["fork"]
