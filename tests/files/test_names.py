"""Names of files that are made from texts."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erasure.artifact import default_name
from erasure.concept import Concept
from erasure.files import inside, slug

TEXTS = (
    "梵高", "毕加索", "Ван Гог", "Репин", "ゴッホ", "😀", "😃", "👩‍🎨", "Édouard Manet", "Edouard Manet", "Dalí",
    "Dali", "C", "C++", "C#",
    "AC/DC", "ac dc", "con", "nul", "...", "x" * 100, "x" * 101, "x" * 102,
    "كهرمان", "शिव", "café", "cafe", "deadbeef",
)  # fmt: skip


@pytest.mark.parametrize("text", ["Van Gogh", "van gogh", "VAN  GOGH", "ｖａｎ ｇｏｇｈ"])
def test_plain_texts_are_their_own_names(text: str) -> None:
    assert slug(text) == "van-gogh"


def test_no_two_texts_have_one_name() -> None:
    for first, second in combinations(TEXTS, 2):
        assert slug(first) != slug(second)
        assert default_name([Concept(first)], "uce") != default_name([Concept(second)], "uce")


def test_composed_and_decomposed_characters_have_one_name() -> None:
    assert slug("e\u0301cole") == slug("\u00e9cole")


def test_a_name_with_the_hash_of_another_is_no_collision() -> None:
    assert slug(slug("Dalí").replace("-", " ")) != slug("Dalí")


@pytest.mark.parametrize("text", TEXTS)
def test_names_go_everywhere(text: str, tmp_path: object) -> None:
    name = default_name([Concept(text)], "diff_quickfix")
    assert name.endswith("-diff-quickfix")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,94}[a-z0-9])?", slug(text, 80))
    assert inside(str(tmp_path), name)
    assert inside(str(tmp_path), slug(text))


@given(st.text(min_size=1, max_size=300))
def test_no_name_is_empty_or_unsafe(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]{1,109}", slug(text)) or not text.split()
