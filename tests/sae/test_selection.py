"""What a concept shares with other words, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure.sae.gates import WordStates
from erasure.sae.selection import MENTIONS, Evidence, rivalry


def prompts_of(*rows: tuple[list[int], list[float], bool]) -> tuple[WordStates, Tensor, Tensor]:
    """Prompts of some tokens, each `MENTIONS` times: with the activity of their latents, and whether they hold the
    concept."""
    rows = tuple(row for row in rows for _ in range(MENTIONS))
    owner = torch.tensor([index for index, (tokens, *_) in enumerate(rows) for _ in tokens])
    ids = torch.tensor([token for tokens, *_ in rows for token in tokens])
    words = WordStates(torch.zeros(len(ids), 1), ids, owner, len(rows))
    return words, torch.tensor([values for _, values, _ in rows]), torch.tensor([own for *_, own in rows])


def evidence_of(features: int) -> Evidence:
    return Evidence(torch.ones(features), torch.zeros(features), torch.full((features,), 4.0))


def test_rivalry_is_the_share_that_the_strongest_other_word_brings() -> None:
    words, activity, holds = prompts_of(
        ([9, 1], [4.0, 4, 4], True), ([9, 2], [0.0, 1, 8], False), ([9, 3], [0.0, 2, 0], False)
    )
    assert rivalry(activity, words, holds, evidence_of(3), [0, 1, 2]).tolist() == pytest.approx([0, 0.5, 1])
    assert rivalry(activity, words, holds, evidence_of(3), [1]).tolist() == pytest.approx([0.5])


def test_a_word_is_a_rival_wherever_in_its_prompts_the_latent_fires() -> None:
    """The latent fires behind the word 2, at a word that every prompt has: only prompts with 2 show it."""
    others = [([token, 9], [0.0], False) for token in range(10, 20)]
    words, activity, holds = prompts_of(([1, 9], [4.0], True), ([2, 9], [3.0], False), *others)
    assert rivalry(activity, words, holds, evidence_of(1), [0]).item() == pytest.approx(0.75)


def test_a_word_said_twice_in_a_prompt_counts_once() -> None:
    words, activity, holds = prompts_of(([1], [4.0], True), ([2, 2, 2], [4.0], False), ([2], [0.0], False))
    assert rivalry(activity, words, holds, evidence_of(1), [0]).item() == pytest.approx(0.5)


def test_words_that_hardly_occur_are_no_rivals() -> None:
    words, activity, holds = prompts_of(([1], [4.0], True), ([2], [4.0], False))
    few = WordStates(words.states[:-1], words.ids[:-1], words.prompt[:-1], words.prompts - 1)
    assert rivalry(activity, words, holds, evidence_of(1), [0]).item() == 1
    assert rivalry(activity[:-1], few, holds[:-1], evidence_of(1), [0]).item() == 0
