"""Prompts made of tokens: texts that are searched token by token, in one text encoder, and tried as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from erasure.backbones import Backbone, PromptTokens, TextTower
from erasure.eval.attacks import Attack, SkippedPromptError
from erasure.eval.attacks.prefixes import as_text, chosen_towers
from erasure.eval.attempts import Attempt

Tower = Literal["text_encoder", "text_encoder_2", "text_encoder_3"]
"""A text encoder of a pipeline."""
AT_ONCE = 64
"""Prompts that a text encoder reads at once."""


def the_tower(attack: Attack, backbone: Backbone, tower: str | None) -> TextTower:
    """The one text encoder that tokens are searched for; see `chosen_towers`."""
    (chosen,) = chosen_towers(attack, backbone, tower)
    return chosen


@dataclass(frozen=True)
class Layout:
    """Where free tokens stand among those of a prompt."""

    own: tuple[int, ...]
    """Tokens of the prompt, without start and end; none where free tokens are all there is."""
    places: tuple[int, ...]
    """For each free token the number of own tokens ahead of it."""

    def ids(self, free: Sequence[int]) -> list[int]:
        """Tokens of the whole prompt."""
        made: list[int] = []
        for index in range(len(self.own) + 1):
            made += [token for token, place in zip(free, self.places, strict=True) if place == index]
            made += self.own[index : index + 1]
        return made

    @property
    def positions(self) -> list[int]:
        """Places of the free tokens among the tokens of the whole prompt."""
        return [place + number for number, place in enumerate(self.places)]


def alone(count: int) -> Layout:
    """Nothing but free tokens."""
    return Layout((), (0,) * count)


def between(own: Sequence[int], every: int) -> Layout:
    """A free token behind every few tokens of a prompt."""
    return Layout(tuple(own), tuple(range(every, len(own) + 1, every)) or (len(own),))


def prompt_of(tower: TextTower, rows: Sequence[Sequence[int]], *, padded: bool = True) -> PromptTokens:
    """Prompts of some tokens, with start, end and padding as the tokeniser puts them.

    Args:
        tower: The text encoder.
        rows: Tokens of each prompt, without start and end.
        padded: Pad to the text encoder's length; else only to the longest prompt's.

    Raises:
        SkippedPromptError: One is longer than the text encoder reads.
    """
    empty, leading = tower.tokenize([""]), tower.leading
    longest = max(map(len, rows))
    if leading + longest + 1 > tower.max_length:
        raise SkippedPromptError(
            f"{leading + longest + 1} tokens are more than the {tower.max_length} of {tower.component}: choose fewer"
        )
    ids = empty.ids.expand(len(rows), -1).clone()
    mask = None if empty.attention_mask is None else torch.zeros_like(ids)
    start, pad = empty.ids[0, :leading].tolist(), int(empty.ids[0, -1])
    for number, row in enumerate(rows):
        whole = [*start, *row, tower.end]
        ids[number] = torch.tensor([*whole, *[pad] * (ids.shape[1] - len(whole))], device=ids.device)
        if mask is not None:
            mask[number, : len(whole)] = 1
    if not padded:
        ids, mask = ids[:, : leading + longest + 1], None if mask is None else mask[:, : leading + longest + 1]
    return PromptTokens(ids, [leading + len(row) + 1 for row in rows], mask)


def summary(tower: TextTower, prompts: PromptTokens) -> Tensor:
    """One vector of each prompt, `(prompts, dim)`: CLIP's pooled one, the mean over a T5's tokens; differentiable."""
    output = tower.module(prompts.ids, attention_mask=prompts.attention_mask)
    if tower.causal:
        return tower.pooled_vector(output)
    place = torch.arange(prompts.ids.shape[1], device=prompts.ids.device)
    inside = (place < torch.tensor(prompts.lengths, device=place.device)[:, None]).to(output.last_hidden_state)
    return (output.last_hidden_state * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


def written(
    backbone: Backbone, tower: TextTower, ids: Sequence[int], *, steps: int = 0, loss: float | None = None
) -> Attempt:
    """What is tried with tokens: the text that they make, which every text encoder reads.

    Args:
        backbone: The model.
        tower: The text encoder that they were chosen for.
        ids: The tokens of the whole prompt, without start and end.
        steps: See `Attempt`.
        loss: See `Attempt`.
    """
    text = as_text(tower, ids)
    cut = any(len(each.prompt_ids(text)) > each.max_length for each in backbone.towers)
    return Attempt({"prompt": text}, steps=steps, loss=loss, changed=tower.word_ids(text) != list(ids), cut=cut)


def drawn_at_random(choices: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Some tokens of those that may be chosen."""
    return choices[torch.randint(len(choices), (count,), generator=generator)].tolist()
