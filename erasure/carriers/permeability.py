"""Gates whose openness is a prompt's similarity to a concept: SPM's facilitated transport (Lyu et al. 2024).

With `E` the states of a text as one vector, and `T` the set of its words' tokens, the permeability of a concept `c`,
which can have several names, for a prompt `p` is

    s(p, c) = max over names n of max(cos(E(p), E(n)), |T(p) & T(n)| / |T(n)|)

and 0 where that is below the concept's floor, so that nothing is changed for prompts far from the concept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erasure.errors import ArtifactError
from erasure.text.words import word_mask

NO_TOKEN = -1
"""Filler after the tokens of shorter names."""
TOKENS, POOLED = 0, 1
"""Parts of a denoiser's conditioning."""


class PromptGate(NamedTuple):
    """The gates of concepts for the prompts of one text encoder."""

    states: Tensor
    """States of each name, see `summed_up`, `(names, tokens, dim)`."""
    ids: Tensor
    """Token ids of each name, followed by `NO_TOKEN`, `(names, longest)` int64."""
    concepts: Tensor
    """Index of each name's concept, `(names,)` int64."""
    floor: Tensor
    """Permeability below which a gate is closed, `(concepts,)`."""
    place: Tensor
    """Part of the denoiser's conditioning by which a prompt is recognised, `(5,)` int64: `TOKENS` or `POOLED`,
    first token, number of tokens (0 for all that follow), first column and number of columns."""
    marks: Tensor
    """Position of the first word, and id of the end token, `(2,)` int64."""
    rules: Tensor
    """Rules, `(3,)` int64. First: 1 uses the states of all positions as one vector, 0 their mean over the words.
    Second: 1 multiplies both factors of an adapter (SPM's released code), 0 their product. Third: 1 gives negative
    prompts the permeability of the prompt that they guide, 0 the stock model's predictions."""

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
        """Part of the denoiser's conditioning: `TOKENS` or `POOLED`."""
        return int(self.place[0])

    @property
    def places(self) -> slice:
        """Tokens of the denoiser's conditioning."""
        first, count = self.place[1:3].tolist()
        return slice(first, first + count if count else None)

    @property
    def columns(self) -> slice:
        """Columns of the denoiser's conditioning."""
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
        """Whether another gate is the same."""
        return self is other or (
            isinstance(other, PromptGate)
            and all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in zip(self, other, strict=True))
        )


def summed_up(states: Tensor, ids: Tensor, marks: Tensor, flat: bool) -> Tensor:
    """Reduce the states of a text to those that are compared with other texts, `(tokens, dim)` or `(1, dim)`.

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
    """Compute how far each concept's gate is open for a prompt, `(concepts,)` float64 in 0-1; see `nearness`."""
    near = nearness(gate, states, ids).clamp(0, 1)
    return torch.where(near >= gate.floor.double().cpu(), near, 0.0)
