"""Gates that open as far as a prompt is near a concept: the facilitated transport of SPM (Lyu et al. 2024).

With `E` the states that a text encoder gives for a text, as one vector, and `T` the set of its words' tokens, the
permeability of a concept `c`, which may have several names, for a prompt `p` is

    s(p, c) = max over names n of max(cos(E(p), E(n)), |T(p) & T(n)| / |T(n)|)

and 0 where that is below the concept's floor, so that nothing at all is changed for prompts that are far from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erasure.errors import ArtifactError
from erasure.text.words import word_mask

NO_TOKEN = -1
"""What stands behind the tokens of a name that is shorter than others."""
TOKENS, POOLED = 0, 1
"""Parts of what a denoiser is told."""


class PromptGate(NamedTuple):
    """How near the prompts that one text encoder reads are to some concepts."""

    states: Tensor
    """`(names, tokens, dim)`: what the text encoder gives for each name, see `summed_up`."""
    ids: Tensor
    """`(names, longest)` int64: tokens of each name, and `NO_TOKEN` behind them."""
    concepts: Tensor
    """`(names,)` int64: the concept that each is a name of."""
    floor: Tensor
    """`(concepts,)`: permeability below which a gate is shut."""
    place: Tensor
    """`(5,)` int64: where in what the denoiser is told the prompt is known again: `TOKENS` or `POOLED`, first token,
    number of tokens (0 for all that follow), first column and number of columns."""
    marks: Tensor
    """`(2,)` int64: position of the first word, and the token that ends a prompt."""
    rules: Tensor
    """`(3,)` int64: 1 where the states of all places are one vector, 0 where it is their mean over the words; 1 where
    both factors of an adapter are multiplied (SPM's released code), 0 where their product is; and 1 where negative
    prompts have the permeability of the prompt that they guide, 0 where they are as of the stock model."""

    def check(self, key: str) -> None:
        """Raise `ArtifactError` unless shapes, types and ranges are those above."""
        whole = (self.ids, self.concepts, self.place, self.marks, self.rules)
        typed = self.states.is_floating_point() and self.floor.is_floating_point()
        typed = typed and all(tensor.dtype == torch.int64 for tensor in whole)
        shaped = (
            self.states.ndim == 3 and self.states.numel() > 0 and self.ids.ndim == 2 and self.ids.numel() > 0
            and len(self.states) == len(self.ids) and self.concepts.shape == self.ids.shape[:1]
            and self.floor.ndim == 1 and self.place.shape == (5,) and self.marks.shape == (2,)
            and self.rules.shape == (3,)
        )  # fmt: skip
        if not (typed and shaped):
            raise ArtifactError(f"the prompt gate of {key!r} does not fit together: make the erasure again")
        if self.ids.is_meta:
            return
        if set(self.concepts.tolist()) != set(range(len(self.floor))) or int(self.ids[:, 0].min()) < 0:
            raise ArtifactError(f"the prompt gate of {key!r} has a concept without a name: make the erasure again")
        if int(self.ids.min()) < NO_TOKEN or min(*self.place.tolist(), *self.marks.tolist()) < 0:
            raise ArtifactError(f"the prompt gate of {key!r} names a token or a place below 0: make the erasure again")
        if not set(self.rules.tolist()) <= {0, 1} or int(self.place[0]) not in (TOKENS, POOLED):
            raise ArtifactError(f"the prompt gate of {key!r} has a rule other than 0 and 1: make the erasure again")
        if not bool(((self.floor >= 0) & (self.floor <= 1)).all()):
            raise ArtifactError(
                f"the prompt gate of {key!r} has the floors {self.floor.tolist()}, allowed: 0 to 1, so that a prompt "
                "that is the concept's name opens it"
            )

    @property
    def source(self) -> int:
        """The part of what the denoiser is told: `TOKENS` or `POOLED`."""
        return int(self.place[0])

    @property
    def places(self) -> slice:
        """Tokens of what the denoiser is told."""
        first, count = self.place[1:3].tolist()
        return slice(first, first + count if count else None)

    @property
    def columns(self) -> slice:
        """Columns of what the denoiser is told."""
        first, count = self.place[3:].tolist()
        return slice(first, first + count)

    @property
    def multiplies_factors(self) -> bool:
        """Whether both factors of an adapter are multiplied, see `rules`."""
        return bool(self.rules[1])

    @property
    def guides(self) -> bool:
        """Whether negative prompts have the permeability of the prompt that they guide, see `rules`."""
        return bool(self.rules[2])

    def equals(self, other: object) -> bool:
        """Whether another one does the same."""
        return self is other or (
            isinstance(other, PromptGate)
            and all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in zip(self, other, strict=True))
        )


def summed_up(states: Tensor, ids: Tensor, marks: Tensor, flat: bool) -> Tensor:
    """The states of one text as they are compared with those of another, `(tokens, dim)` or `(1, dim)`.

    Args:
        states: `(tokens, dim)`.
        ids: `(tokens,)`.
        marks: See `PromptGate.marks`.
        flat: Take the states of all places, as the released code does it for CLIP; else their mean over the words and
            the end token, since T5 pads to a length that calls choose.
    """
    if flat:
        return states
    first, end = marks.tolist()
    words = word_mask(ids[None].cpu(), end, first)[0].to(states.device)
    return states[words].mean(0, keepdim=True)


def similarity(states: Tensor, names: Tensor) -> Tensor:
    """`cos(E(p), E(n))` for each name, `(names,)` float64.

    Args:
        states: Those of a prompt, `(tokens, dim)`.
        names: Those of the names, `(names, tokens, dim)`. Where texts are padded to another length, the places that
            both have are compared.
    """
    count = min(len(states), names.shape[1])
    own, others = states[:count].double().flatten(), names[:, :count].double().flatten(1)
    return torch.cosine_similarity(others, own[None], dim=1)


def overlap(words: Tensor, names: Tensor) -> Tensor:
    """`|T(p) & T(n)| / |T(n)|` for each name, `(names,)` float64.

    Args:
        words: Tokens of the words of a prompt, `(words,)`.
        names: See `PromptGate.ids`.
    """
    prompt = set(words.tolist())
    sets = [set(name) - {NO_TOKEN} for name in names.tolist()]
    return torch.tensor([len(prompt & name) / len(name) for name in sets], dtype=torch.float64)


def nearness(gate: PromptGate, states: Tensor, ids: Tensor) -> Tensor:
    """`s(p, c)` of this module's docstring ahead of the floor, `(concepts,)` float64.

    Args:
        gate: The gate.
        states: What the text encoder gives for a prompt, `(tokens, dim)`.
        ids: Tokens of the prompt, start, end and padding included, `(tokens,)`.
    """
    first, end = gate.marks.tolist()
    ids, flat = ids.cpu(), bool(gate.rules[0])
    own = summed_up(states.detach().cpu(), ids, gate.marks, flat)
    near = similarity(own, gate.states.cpu())
    words = ids[word_mask(ids[None], end, first)[0]]
    near = torch.maximum(near, overlap(words[words != end], gate.ids.cpu()))
    owners = gate.concepts.cpu()
    return torch.stack([near[owners == concept].amax() for concept in range(len(gate.floor))])


def permeability(gate: PromptGate, states: Tensor, ids: Tensor) -> Tensor:
    """How far each concept's gate is open for a prompt, `(concepts,)` float64 in 0-1; see `nearness`."""
    near = nearness(gate, states, ids).clamp(0, 1)
    return torch.where(near >= gate.floor.double().cpu(), near, 0.0)
