"""Prompts that closed forms erase and preserve."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasure.backbones import TextTower
from erasure.concept import Concept
from erasure.text.corpora import vocabulary, vocabulary_prompts
from erasure.text.words import AlignedPrompt, aligned_prompts, paired_at_the_end


def bare_or_phrased(
    tower: TextTower, concept: Concept, default_anchor: str = "", *, bare: Sequence[str] = ()
) -> list[AlignedPrompt]:
    """Give the prompts that name a concept, aligned with the anchor's prompts that replace them.

    Args:
        tower: Tokenises them.
        concept: Concept to erase.
        default_anchor: Anchor of a concept that has none; empty for no replacement.
        bare: Phrasings that end with the concept. They are aligned by their last tokens, as released code does. When
            left out, every phrasing of the concept is used and aligned word by word.
    """
    if not bare:
        return aligned_prompts(tower, concept, default_anchor)
    anchor = default_anchor if concept.anchor is None else concept.anchor
    return [paired_at_the_end(tower, template, words, anchor) for words in concept.names for template in bare]


def random_prompts(tower: TextTower, concepts: Sequence[Concept], count: int, seed: int) -> list[str]:
    """Make random prompts of the tokeniser's words without those of the concepts; none when there are no other words.

    Args:
        tower: Text encoder whose tokeniser gives the words.
        concepts: Concepts whose words are left out.
        count: Number of prompts; 0 for none.
        seed: Seeds the choice.
    """
    words = vocabulary(tower, concepts) if count else []
    return vocabulary_prompts(words, count, torch.Generator().manual_seed(seed)) if words else []
