"""The prompts that measure gates, and their table."""

from __future__ import annotations

import random

from erasure.assets.build.controls import Row as Control
from erasure.assets.build.controls import markdown as controls_table
from erasure.assets.build.gates import WITHOUT, Row, markdown, misspellings, prompts
from erasure.assets.world import OBJECTS
from erasure.concept import Concept


def words(prompt: str) -> set[str]:
    return set(prompt.replace(",", " ").split())


def test_prompts_hold_the_concept_or_not() -> None:
    for concept in (Concept("cat"), Concept("ink", kind="style")):
        found = prompts(concept, {"cat": ["caat"]}, random.Random(0))
        for kind in ("unseen phrasings", "two objects"):
            assert all(concept.target in words(prompt) for prompt in found[kind])
        named = {concept.target, "caat", *(OBJECTS[concept.target].synonyms if concept.kind == "object" else ())}
        assert not any(named & words(prompt) for prompt in found[WITHOUT])
    cat = prompts(Concept("cat"), {"cat": ["caat"]}, random.Random(0))
    assert all({"kitten", "kitty"} & words(prompt) for prompt in cat["synonyms"])
    assert all("caat" in words(prompt) for prompt in cat["misspellings"])
    assert "misspellings" not in prompts(Concept("dog"), {"cat": ["caat"]}, random.Random(0))


def test_misspellings_are_other_words() -> None:
    assert misspellings("house") == ["hose", "houuse", "huose"]
    assert misspellings("apple") == ["aple", "appple"]


def test_tables_show_intervals() -> None:
    shown = markdown([Row("two objects", 0.95, 0.9, 200)])
    assert "| two objects | 0.950 (0.910-0.973) | 0.900 (" in shown
    assert "| random | 0.000 (0.000-0.023) | 160 |" in controls_table([Control("random", 0.0, 160)])
