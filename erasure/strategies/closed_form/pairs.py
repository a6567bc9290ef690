"""Prompts aligned by their ends, as released code aligns them."""

from __future__ import annotations

import torch

from erasure.backbones import TextTower
from erasure.strategies.prompts import AlignedPrompt


def paired_at_the_end(tower: TextTower, template: str, words: str, anchor: str) -> AlignedPrompt:
    """Align a prompt that ends with a concept to the same prompt with its anchor, by the last token ahead of the end.

    The last token answers to the last one, the end token and the padding to those behind it. Where the anchor is empty
    the last token is that of the phrasing, or the start token when the phrasing has no other words.

    Raises:
        ConceptError: The concept has no known token.
    """
    tower.check_words(words)
    prompt, anchor_prompt = template.format(words), template.format(anchor).rstrip()
    last, anchor_last = (len(tower.prompt_ids(text, truncate=True)) - 2 for text in (prompt, anchor_prompt))
    positions = torch.arange(tower.max_length)
    positions[last:] = torch.arange(anchor_last, anchor_last + tower.max_length - last).clamp(max=tower.max_length - 1)
    return AlignedPrompt(prompt, anchor_prompt, last, last, positions)
