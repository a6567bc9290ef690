"""Positions of a prompt's subjects among its tokens, and their layout in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.errors import MaskError, OptionError
from erasure.masks import read_masks
from erasure.text.words import whole_words

Rivals = Literal["words", "padded"]


class Words(NamedTuple):
    """Token positions of the subjects in their prompts."""

    weights: Tensor
    """Weights of each subject's tokens, which sum to 1, `(samples, tokens, subjects)`."""
    present: Tensor
    """Whether a sample has the subject, `(samples, subjects)` bool."""
    inside: Tensor
    """Words, without start, end and padding, `(samples, tokens)` bool."""


def subject_weights(
    towers: Sequence[TextTower], prompts: Sequence[str], subjects: Sequence[str] | Sequence[Sequence[str]]
) -> Words:
    """Find the subjects in their prompts, as the tokenisers split them; all vectors of learned tokens count.

    Text encoders may split a word into different numbers of tokens, so each encoder gets an equal share.

    Raises:
        OptionError: A subject is not in its prompt, or there are no subjects.
    """
    subjects = [subjects] if isinstance(subjects, str) else subjects
    alike = all(isinstance(subject, str) for subject in subjects)
    # Subjects are the same for all prompts, or one list is given for each.
    each = [[str(name) for name in subjects]] * len(prompts) if alike else [list(names) for names in subjects]
    if len(each) != len(prompts) or not all(each):
        raise OptionError(f"{len(prompts)} prompts need a list of subjects each, with one at least; got {subjects!r}")
    length = max(tower.max_length for tower in towers)
    weights = torch.zeros(len(prompts), length, max(map(len, each)))
    present = torch.zeros(len(prompts), weights.shape[2], dtype=torch.bool)
    inside = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (prompt, names) in enumerate(zip(prompts, each, strict=True)):
        for tower in towers:
            words, spans = subject_spans(tower, prompt, names)
            inside[row, words] = True
            for column, span in enumerate(spans):
                weights[row, span, column] += 1 / (span.stop - span.start) / len(towers)
                present[row, column] = True
    return Words(weights, present, inside)


def subject_spans(tower: TextTower, prompt: str, names: Sequence[str]) -> tuple[slice, list[slice]]:
    """Find the positions of a prompt's words, and of each subject: its first mention that no other subject uses."""
    ids = tower.prompt_ids(prompt, truncate=True)
    inside = slice(tower.leading, len(ids) - 1)
    spans: list[slice] = []
    for name in names:
        taken = [span.start for span in spans]  # "a cat and a cat": the second is another
        free = [span for span in whole_words(tower, ids[: inside.stop], name) if span.start not in taken]
        if not free:
            raise OptionError(
                f"the subject {name!r} is not among the words of {prompt!r} that the text encoder reads: name a word "
                "of the prompt, or shorten the prompt"
            )
        spans.append(free[0])
    return inside, spans


def rival_tokens(towers: Sequence[TextTower], inside: Tensor, rivals: Rivals | None) -> Tensor:
    """Mark the tokens of the softmax in Attend-and-Excite, `(samples, tokens)` bool.

    Args:
        towers: The text encoders.
        inside: The words of the prompts, `(samples, tokens)` bool.
        rivals: See `CompositionSettings`.
    """
    if rivals is None:
        padded = len(towers) == 1 and all(tower.tokenizer.pad_token_id == tower.end for tower in towers)
        rivals = "padded" if padded else "words"
    if rivals == "words":
        return inside
    places = torch.arange(inside.shape[1])
    leading = min(tower.leading for tower in towers)
    return ((places >= leading) & (places < inside.shape[1] - 1)).expand_as(inside)


def read_layout(layout: Sequence[object], size: tuple[int, int], subjects: int) -> Tensor:
    """Read the layout of the subjects, `(subjects, height, width)` bool.

    Raises:
        MaskError: The numbers of masks and subjects differ, or a mask is empty.
    """
    masks = list(layout)
    if len(masks) != subjects:
        raise MaskError(f"a layout of {len(masks)} masks for {subjects} subjects: give one for each")
    found = read_masks(masks, size, subjects)
    if (empty := ~found.flatten(1).any(1)).any():
        raise MaskError(
            f"mask {int(empty.nonzero()[0])} of the layout covers nothing: draw where its subject should be"
        )
    return found
