"""Words of an erasure in a text, against a search for each of them."""

from __future__ import annotations

import re

import pytest

from erasure.artifact import Erasure, ErasureConfig
from erasure.carriers.edits import Edits
from erasure.guards.words import is_named

WORDS = ["cat", "Van Gogh", "<my-pet>", "C++", "été", "rock'n'roll", "猫", "++", "dog 2", "_x", "STRASSE", ":)"]
TEXTS = [
    "a cat", "catalogue", "bobcat", "Cat.", "van  gogh", "van gogh's", "vangogh", "a <my-pet> here", "my-pet",
    "x<my-pet>", "c++", "c+++", "abc++", "c", "ÉTÉ", "Straße", "rock'n'roll", "rock n roll", "the 猫", "黒猫", "a++b",
    "a ++", "dog 2", "dog 22", "dog", "_x", "x", "", "  ", ":)", "x:)", "smile :) please",
]  # fmt: skip


def erasure_of(*words: str) -> Erasure:
    return Erasure(ErasureConfig("uce", [{"target": word} for word in words], "stable-diffusion"), Edits())


def searched(word: str, text: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text))


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_found_where_a_search_for_it_finds_it(word: str) -> None:
    made = erasure_of(word)
    found = {text: is_named(made, text.casefold()) for text in TEXTS}
    assert found == {text: searched(word, text.casefold()) for text in TEXTS}
    assert any(found.values())


def test_one_of_many_words_is_found_and_synonyms_and_anchors_count() -> None:
    assert all(is_named(erasure_of(*WORDS), word.casefold()) for word in WORDS)
    concept = {"target": "cat", "synonyms": ["kitty cat"], "anchor": "dog"}
    made = Erasure(ErasureConfig("uce", [concept], "stable-diffusion"), Edits())
    told = {text: is_named(made, text) for text in ("kitty cat", "a dog", "kitty", "a house")}
    assert told == {"kitty cat": True, "a dog": True, "kitty": False, "a house": False}
