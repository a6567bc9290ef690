"""Filters of prompts: tokens that bring a prompt near a concept are projected away from it (Yoon et al. 2024).

The pooled vectors of a concept's names span a subspace with the projection `P_C`; those of a prompt, each with another
of its `n` tokens masked, span one with the projection `P_I`. Token `i` is a trigger where the prompt without it is far
from the concept, `d_i = |(I - P_C) p_i| >= (1 + alpha) r`, with `r` the mean of `d_j` over the other tokens, or the
distance of the prompt as it is. The states `x` of triggers become

    (I - P_C) P_I x

and those of the other tokens stay, but for tokens that may carry what a trigger means: those behind it in a causal
text encoder, all of the prompt in another one.

With `z` = 1 - the mean cosine between the states of a prompt's tokens and what the same projection makes of them,
triggers are projected in the first `1 + round(most sigmoid(sharpness (10 z - midpoint)))` of 50 steps; later ones read
the prompt as it is.
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
"""Share of the greatest singular value below which a direction is rounding."""


class PromptFilter(NamedTuple):
    """What is projected away from the states of one text encoder."""

    basis: Tensor
    """`(directions, dim)`: orthonormal rows that span the concept's pooled vectors."""
    figures: Tensor
    """`(4,)`: alpha, most steps of 50, sharpness and midpoint."""
    attenuation: Tensor
    """`(2,)`: factors of low frequencies in the skipped features of a UNet's widest channels, and of those half as
    wide; `(0,)` where features are left as they are."""
    place: Tensor
    """`(3,)` int64: where the states stand in what the denoiser is told: first token, number of tokens (0 for all that
    follow) and first column."""
    marks: Tensor
    """`(3,)` int64: position of the first word, the token that ends a prompt, and the one that masks another."""
    rules: Tensor
    """`(2,)` int64: 1 where a prompt without a token is compared with the prompt as it is, 0 with those without
    another; and what is projected with triggers: 0 nothing, 1 all tokens behind the first one, 2 the whole prompt."""

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
        """Columns of what the denoiser is told."""
        first = int(self.place[2])
        return slice(first, first + self.basis.shape[1])

    @property
    def places(self) -> slice:
        """Tokens of what the denoiser is told."""
        first, count = self.place[:2].tolist()
        return slice(first, first + count if count else None)

    def equals(self, other: object) -> bool:
        """Whether another one does the same."""
        return self is other or (
            isinstance(other, PromptFilter)
            and all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in zip(self, other, strict=True))
        )


def span(vectors: Tensor) -> Tensor:
    """Orthonormal rows `(rank, dim)` with the span of vectors `(n, dim)`."""
    _, sizes, rows = torch.linalg.svd(vectors.double(), full_matrices=False)
    return rows[sizes > NEGLIGIBLE * sizes.max()]


def rest(states: Tensor, basis: Tensor) -> Tensor:
    """`(I - P) x` of states `(..., dim)`, with `P` the projection on the span of orthonormal rows."""
    return states - states @ basis.T @ basis


def triggers(masked: Tensor, own: Tensor, basis: Tensor, alpha: float, against_own: bool = False) -> Tensor:
    """Which tokens bring a prompt near a concept, `(n,)` bool.

    Args:
        masked: Pooled vectors `(n, dim)` of the prompt with each of its tokens masked.
        own: That of the prompt as it is, `(dim,)`.
        basis: Of the concept.
        alpha: How much farther the prompt without a trigger is, as a share.
        against_own: Compare with the prompt as it is. So is a lone token in any case, which has no others.
    """
    away = rest(masked.double(), basis.double()).norm(dim=1)
    count = len(away)
    if count == 1 or against_own:
        return away >= (1 + alpha) * rest(own.double(), basis.double()).norm()
    others = (away.sum() - away) / max(count - 1, 1)
    return away >= (1 + alpha) * others


def projected(states: Tensor, own: Tensor, basis: Tensor) -> Tensor:
    """`(I - P_C) P_I x` of states `(..., dim)`.

    Args:
        states: States of tokens.
        own: Orthonormal rows of the prompt's own subspace.
        basis: Those of the concept's.
    """
    return rest(states @ own.T @ own, basis)


def steps(states: Tensor, changed: Tensor, figures: Tensor) -> int:
    """In how many of 50 steps triggers are projected.

    Args:
        states: Those of a prompt's tokens, start and end included, `(tokens, dim)`.
        changed: All of them projected.
        figures: See `PromptFilter.figures`.
    """
    _, most, sharpness, midpoint = figures.tolist()
    z = 1 - float(F.cosine_similarity(states.double(), changed.double(), dim=-1).mean())
    exponent = max(-700.0, min(700.0, -sharpness * (10 * z - midpoint)))
    return 1 + round(most / (1 + math.exp(exponent)))
