"""Prompt filters: tokens that bring a prompt near a concept are projected away from it (SAFREE, Yoon et al. 2024).

The pooled vectors of a concept's names span a subspace with the projection `P_C`. Those of a prompt, each with another
one of its `n` tokens masked, span one with the projection `P_I`. Token `i` is a trigger if the prompt without it is
far from the concept, `d_i = |(I - P_C) p_i| >= (1 + alpha) r`, where `r` is the mean of `d_j` over the other tokens,
or the distance of the unmasked prompt. The states `x` of triggers become

    (I - P_C) P_I x

and the states of other tokens stay, except for tokens that may carry a trigger's meaning: those after it in a causal
text encoder, the whole prompt in a bidirectional one.

With `z` = 1 - mean cosine between the states of a prompt's tokens and their projections, triggers are projected in the
first `1 + round(most sigmoid(sharpness (10 z - midpoint)))` of 50 steps; later steps use the unchanged prompt.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.carriers.safety import OF_STEPS
from erasure.errors import ArtifactError

NEGLIGIBLE = 1e-6
"""Share of the largest singular value below which a direction counts as rounding."""


class PromptFilter(NamedTuple):
    """The filter of one text encoder's states."""

    basis: Tensor
    """Orthonormal rows that span the concept's pooled vectors, `(directions, dim)`."""
    figures: Tensor
    """Alpha, largest number of 50 steps, sharpness and midpoint, `(4,)`."""
    attenuation: Tensor
    """Factors of low frequencies in a UNet's skip features, at the most channels and at half as many, `(2,)`;
    `(0,)` where features are not changed."""
    place: Tensor
    """Position of the states in the denoiser's conditioning, `(3,)` int64: first token, number of tokens (0 for all
    that follow) and first column."""
    marks: Tensor
    """Position of the first word, id of the end token, and id of the masking token, `(3,)` int64."""
    rules: Tensor
    """Rules, `(2,)` int64. First: 1 compares a prompt without a token with the whole prompt, 0 with those without
    another token. Second: what is projected with triggers, 0 nothing, 1 all tokens after the first trigger, 2 the
    whole prompt."""

    def check(self, key: str) -> None:
        """Raise `ArtifactError` unless shapes, types and ranges are those above."""
        floats = all(tensor.is_floating_point() for tensor in (self.basis, self.figures, self.attenuation))
        whole = self.place.dtype == self.marks.dtype == self.rules.dtype == torch.int64
        shaped = (
            self.basis.ndim == 2 and 0 < len(self.basis) <= self.basis.shape[1] and self.figures.shape == (4,)
            and self.attenuation.shape in ((0,), (2,)) and self.place.shape == self.marks.shape == (3,)
            and self.rules.shape == (2,)
        )  # fmt: skip
        if not (floats and whole and shaped):
            raise ArtifactError(f"the prompt filter of {key!r} does not fit together: make the erasure again")
        if self.basis.is_meta:
            return
        if min(*self.place.tolist(), *self.marks.tolist(), *self.rules.tolist()) < 0:
            raise ArtifactError(
                f"the prompt filter of {key!r} names a token or a place below 0: make the erasure again"
            )
        _, most, sharpness, _ = self.figures.tolist()
        if not 0 <= most <= OF_STEPS or sharpness < 0:
            raise ArtifactError(
                f"the prompt filter of {key!r} acts in at most {most:g} of {OF_STEPS} steps with a sharpness of "
                f"{sharpness:g}, allowed: 0 to {OF_STEPS}, and 0 or more"
            )
        if self.attenuation.numel() and not bool(((self.attenuation >= 0) & (self.attenuation <= 1)).all()):
            raise ArtifactError(f"the prompt filter of {key!r} amplifies features, allowed factors: 0 to 1")
        rows = self.basis.double()
        if float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max()) > 1e-3:
            raise ArtifactError(f"the prompt filter of {key!r} holds rows that are not orthonormal: make it again")

    @property
    def columns(self) -> slice:
        """Columns of the denoiser's conditioning."""
        first = int(self.place[2])
        return slice(first, first + self.basis.shape[1])

    @property
    def places(self) -> slice:
        """Tokens of the denoiser's conditioning."""
        first, count = self.place[:2].tolist()
        return slice(first, first + count if count else None)

    def equals(self, other: object) -> bool:
        """Whether another filter is the same."""
        return self is other or (
            isinstance(other, PromptFilter)
            and all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in zip(self, other, strict=True))
        )


def span(vectors: Tensor) -> Tensor:
    """Compute orthonormal rows `(rank, dim)` with the span of vectors `(n, dim)`."""
    _, sizes, rows = torch.linalg.svd(vectors.double(), full_matrices=False)
    return rows[sizes > NEGLIGIBLE * sizes.max()]


def rest(states: Tensor, basis: Tensor) -> Tensor:
    """Compute `(I - P) x` for states x `(..., dim)`, with P the projection onto the span of orthonormal rows."""
    return states - states @ basis.T @ basis


def triggers(masked: Tensor, own: Tensor, basis: Tensor, alpha: float, against_own: bool = False) -> Tensor:
    """Mark the tokens that bring a prompt near a concept, `(n,)` bool.

    Args:
        masked: Pooled vectors `(n, dim)` of the prompt with each of its tokens masked.
        own: Pooled vector of the whole prompt, `(dim,)`.
        basis: Orthonormal rows of the concept's subspace.
        alpha: Relative increase of the distance without a trigger.
        against_own: Compare with the whole prompt. A single token, which has no others, is always compared so.
    """
    away = rest(masked.double(), basis.double()).norm(dim=1)
    count = len(away)
    if count == 1 or against_own:
        return away >= (1 + alpha) * rest(own.double(), basis.double()).norm()
    others = (away.sum() - away) / max(count - 1, 1)
    return away >= (1 + alpha) * others


def projected(states: Tensor, own: Tensor, basis: Tensor) -> Tensor:
    """Project states into the prompt's subspace and away from the concept's: `(I - P_C) P_I x`.

    Args:
        states: States x of tokens, `(..., dim)`.
        own: Orthonormal rows of the prompt's own subspace, `(rank, dim)`.
        basis: Orthonormal rows of the concept's subspace, `(rank, dim)`.
    """
    return rest(states @ own.T @ own, basis)


def steps(states: Tensor, changed: Tensor, figures: Tensor) -> int:
    """Compute the number of 50 steps in which triggers are projected.

    Args:
        states: States of a prompt's tokens, with start and end, `(tokens, dim)`.
        changed: The same states after projection.
        figures: See `PromptFilter.figures`.
    """
    _, most, sharpness, midpoint = figures.tolist()
    z = 1 - float(F.cosine_similarity(states.double(), changed.double(), dim=-1).mean())
    exponent = max(-700.0, min(700.0, -sharpness * (10 * z - midpoint)))
    return 1 + round(most / (1 + math.exp(exponent)))
