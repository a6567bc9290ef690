"""What a concept shares with other words, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure.sae.gates import Labels, WordStates
from erasure.sae.selection import MENTIONS, Evidence, rivalry


def words_of(*rows: tuple[int, list[float], bool]) -> tuple[WordStates, Labels]:
    """One prompt of one word each: its token, its latents, and whether it is the concept; each `MENTIONS` times."""
    rows = tuple(row for row in rows for _ in range(MENTIONS))
    states = torch.tensor([values for _, values, _ in rows])
    held = torch.tensor([own for *_, own in rows])
    words = WordStates(states, torch.tensor([token for token, *_ in rows]), torch.arange(len(rows)), len(rows))
    return words, Labels(held, held, ~held)


class Identity:
    """A dictionary whose latents are the states."""

    W_enc = torch.zeros(1)

    def slice(self, features: list[int]) -> Any:
        return SimpleNamespace(encode=lambda x: x[:, features].clamp_min(0))


def test_rivalry_is_the_share_that_the_strongest_other_word_draws() -> None:
    words, labels = words_of((1, [4.0, 4, 4], True), (2, [0.0, 1, 8], False), (3, [0.0, 2, 0], False))
    found = Evidence(torch.ones(3), torch.zeros(3), torch.full((3,), 4.0))
    sae: Any = Identity()
    assert rivalry(sae, words, labels, found, [0, 1, 2]).tolist() == pytest.approx([0, 0.5, 1])
    assert rivalry(sae, words, labels, found, [1]).tolist() == pytest.approx([0.5])


def test_words_that_hardly_occur_are_no_rivals() -> None:
    words, labels = words_of((1, [4.0], True), (2, [4.0], False))
    few = WordStates(words.states[:-1], words.ids[:-1], words.prompt[:-1], words.prompts - 1)
    less = Labels(labels.holds[:-1], labels.positive[:-1], labels.negative[:-1])
    found = Evidence(torch.ones(1), torch.zeros(1), torch.full((1,), 4.0))
    sae: Any = Identity()
    assert rivalry(sae, words, labels, found, [0]).item() == 1
    assert rivalry(sae, few, less, found, [0]).item() == 0
