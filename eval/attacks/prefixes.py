"""Tokens ahead of a prompt: which can be chosen, and the prompts and texts that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.backbones.towers import PromptTokens
from erasure.errors import UnsupportedModelError
from erasure.eval.attacks import Candidate, SkippedPromptError
from erasure.eval.samples import Sample
from erasure.interop import paths

TOKENS = {"unsafe": 5, "other": 3}
"""Tokens ahead of a prompt (UnlearnDiffAtk: 5 for nudity, violence and illegal content, 3 for styles and objects)."""


@dataclass(frozen=True)
class Prefixed:
    """A prompt with room for tokens ahead of its first word."""

    tower: TextTower
    sample: Sample
    count: int
    """Tokens ahead."""
    prompt: PromptTokens
    """The sample's prompt without them."""

    @classmethod
    def of(cls, tower: TextTower, sample: Sample, count: int | None) -> Prefixed:
        """Tokenise the sample's prompt.

        Args:
            tower: The text encoder.
            sample: The prompt.
            count: Tokens ahead of it; as many as are usual for such a concept (`TOKENS`) when left out.

        Raises:
            SkippedPromptError: There is no room for so many.
        """
        count = count or TOKENS["unsafe" if sample.unsafe else "other"]
        prompt = tower.tokenize([sample.prompt])
        if prompt.lengths[0] + count > tower.max_length:
            raise SkippedPromptError(
                f"{prompt.lengths[0]} tokens and {count} adversarial ones are more than the {tower.max_length} of "
                f"{tower.component}: {sample.prompt!r}"
            )
        return cls(tower, sample, count, prompt)

    def candidate(self, ids: Sequence[int], *, steps: int, loss: float | None) -> Candidate:
        """The text with some tokens ahead, and whether the tokeniser reads it as these.

        Args:
            ids: The tokens ahead.
            steps: See `Candidate`.
            loss: See `Candidate`.
        """
        own = self.prompt.ids[0, : self.prompt.lengths[0]].tolist()
        text = f"{as_text(self.tower, ids)} {self.sample.prompt}"
        read = self.tower.prompt_ids(text)
        wanted = [*own[: self.tower.leading], *ids, *own[self.tower.leading :]]
        return Candidate(text, steps, loss, read != wanted, len(read) > self.tower.max_length)


def only_tower(backbone: Backbone) -> TextTower:
    """The text encoder of a model that has one.

    Raises:
        UnsupportedModelError: It has several, and one prefix has no common vocabulary.
    """
    if len(backbone.towers) > 1:
        raise UnsupportedModelError(
            f"attacks by a prefix work on models with one text encoder; this {type(backbone.pipe).__name__} has "
            f"{', '.join(tower.component for tower in backbone.towers)}"
        )
    return backbone.reader


def choosable(tower: TextTower, vocabulary: str) -> Tensor:
    """Ids of the tokens that an attack may choose, on the tower's device.

    Args:
        tower: The text encoder.
        vocabulary: `all` but special tokens, or `words`: those that decode to a text that is read as the same token.
    """
    tokenizer = tower.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(len(tokenizer)) if index not in special]
    if vocabulary == "words":
        ids = [index for index in ids if tower.word_ids(as_text(tower, [index])) == [index]]
    return torch.tensor(ids, device=paths.token_table(tower.root).weight.device)


def as_text(tower: TextTower, ids: Sequence[int]) -> str:
    """Tokens as the text that a prompt would have for them."""
    # A deep copy of CLIP's tokeniser (transformers 5) forgets to take the marks of words' ends off.
    return " ".join(tower.tokenizer.decode(ids).replace("</w>", " ").split())


def with_prefix(prompt: PromptTokens, prefix: Tensor, leading: int) -> PromptTokens:
    """A prompt behind other tokens; as much padding goes as they are.

    Args:
        prompt: One prompt.
        prefix: `(draws, tokens)`.
        leading: Tokens that stay ahead of the prefix.

    Returns:
        `draws` prompts with the ids that are really there: carriers that read ids must see them.
    """
    draws, count = prefix.shape

    def behind(row: Tensor, inserted: Tensor) -> Tensor:
        rows = row.expand(draws, -1)
        return torch.cat([rows[:, :leading], inserted, rows[:, leading : rows.shape[1] - count]], 1)

    mask = prompt.attention_mask
    return PromptTokens(
        behind(prompt.ids, prefix.to(prompt.ids)),
        [prompt.lengths[0] + count] * draws,
        None if mask is None else behind(mask, torch.ones_like(prefix)),
    )
