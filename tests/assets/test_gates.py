"""The prompts that measure gates, and their table."""

from __future__ import annotations

import random

from erasure.assets.build import controls, gates
from erasure.assets.build.gates import WITHOUT, misspellings, prompts
from erasure.assets.build.measured import figure
from erasure.assets.world import OBJECTS
from erasure.concept import Concept
from erasure.eval.statistics import wilson


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


def test_rates_have_intervals() -> None:
    (row,) = gates.rows([gates.Opened("two objects", 0.95, 0.9, 200)])
    assert row == {"prompts": "two objects", "features": figure(wilson(190, 200), 200),
                   "probe": figure(wilson(180, 200), 200), "n": 200}  # fmt: skip
    (row,) = controls.rows([controls.Control("random", 0.0, 160)])
    assert row == {"features": "random", "UA": {"value": 0.0, "low": 0.0, "high": 0.023446, "n": 160}, "n": 160}
