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
    """The prompts that name a concept, aligned with what takes their place.

    Args:
        tower: Tokenises them.
        concept: What is erased.
        default_anchor: Takes the place of a concept without anchor; nothing does when empty.
        bare: Phrasings that end with the concept, which are aligned by their last tokens as released code does; every
            phrasing of the concept, aligned word by word, when left out.
    """
    if not bare:
        return aligned_prompts(tower, concept, default_anchor)
    anchor = default_anchor if concept.anchor is None else concept.anchor
    return [paired_at_the_end(tower, template, words, anchor) for words in concept.names for template in bare]


def random_prompts(tower: TextTower, concepts: Sequence[Concept], count: int, seed: int) -> list[str]:
    """Random prompts from a tokeniser's own words but those of the concepts; none where it has no others.

    Args:
        tower: Its tokeniser's words are used.
        concepts: What is erased.
        count: How many; 0 for none.
        seed: Seeds the choice.
    """
    words = vocabulary(tower, concepts) if count else []
    return vocabulary_prompts(words, count, torch.Generator().manual_seed(seed)) if words else []
