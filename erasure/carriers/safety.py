"""Safety guidance away from predictions for a concept's own prompt (SLD, Schramowski et al. 2023).

With predictions `e_p` for the prompt, `e_0` for the negative or empty one and `e_s` for the concept, elementwise:

    mu = min(1, scale |e_p - e_s|) where e_p - e_s < threshold, else 0
    g  = mu (e_s - e_0) + momentum_scale nu
    nu <- momentum_decay nu + (1 - momentum_decay) g

A pipeline's guidance is linear in its prediction for the prompt. With `e_p - g` instead of `e_p`, any stock pipeline
therefore computes the paper's `e_0 + w (e_p - e_0 - g)`, whatever its scale `w`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erasure.errors import ArtifactError

OF_STEPS = 50
"""Number of steps of the schedules to which the papers' numbers of steps refer."""
CONCEPT, NOTHING = 0, 1
"""Rows of the encodings: of the concept, and of the empty prompt."""


class SafetyGuidance(NamedTuple):
    """The guidance of one erasure."""

    tokens: Tensor
    """Conditioning tokens of the concept and of the empty prompt, `(2, tokens, dim)`."""
    mask: Tensor
    """Attention mask of these tokens, `(2, tokens)` int64."""
    figures: Tensor
    """Scale, threshold, momentum scale and momentum decay, `(4,)`."""
    warmup: Tensor
    """Number of steps, of `OF_STEPS`, before guidance begins, `()` int64."""
    pooled: Tensor = torch.zeros(2, 0)
    """Pooled vectors, `(2, dim)`; `(2, 0)` for models without them."""

    def check(self, key: str) -> None:
        """Raise `ArtifactError` unless shapes, types and ranges are those above."""
        tokens, mask, figures, warmup, pooled = self
        floats = all(tensor.is_floating_point() for tensor in (tokens, figures, pooled))
        whole = mask.dtype == warmup.dtype == torch.int64
        shaped = (
            tokens.ndim == 3 and len(tokens) == 2 and tokens.numel() > 0 and mask.shape == tokens.shape[:2]
            and figures.shape == (4,) and warmup.ndim == 0 and pooled.ndim == 2 and len(pooled) == 2
        )  # fmt: skip
        if not (floats and whole and shaped):
            raise ArtifactError(f"the safety guidance of {key!r} does not fit together: make the erasure again")
        if warmup.is_meta:
            return
        if not 0 <= int(warmup) < OF_STEPS:
            raise ArtifactError(
                f"the safety guidance of {key!r} warms up for {int(warmup)} of {OF_STEPS} steps, allowed: 0 to "
                f"{OF_STEPS - 1}"
            )
        scale, _, _, decay = figures.tolist()
        # NaN and infinity are looked for in all tensors at once.
        if scale < 0 or decay < 0 or decay > 1:
            raise ArtifactError(
                f"the safety guidance of {key!r} has the scale {scale:g} and the momentum decay {decay:g}, allowed: 0 "
                "or more, and 0 to 1"
            )

    @property
    def acts(self) -> bool:
        """Whether the guidance has an effect: its scale is not 0, and the two encodings differ."""
        known = torch.cat([self.tokens.flatten(1), self.pooled.to(self.tokens.dtype)], 1)
        return float(self.figures[0]) > 0 and not torch.equal(known[CONCEPT], known[NOTHING])

    def stated(self) -> dict[str, Tensor]:
        """Give the tensors by field, without pooled vectors for models that have none."""
        return {name: tensor for name, tensor in self._asdict().items() if name != "pooled" or tensor.numel()}


class Moments(NamedTuple):
    """The momentum of a guidance at one noise level."""

    before: Tensor | None
    """Momentum before this level; `None` at the first. A sampler may evaluate a level twice."""
    after: Tensor
    """Momentum after this level."""

    @classmethod
    def next(cls, before: Tensor | None, direction: Tensor, decay: float) -> Moments:
        """Compute the momentum at a level, from the guidance's direction there."""
        new = (1 - decay) * direction
        return cls(before, new if before is None else decay * before + new)


def direction(own: Tensor, null: Tensor, concept: Tensor, momentum: Tensor | None, figures: Tensor) -> Tensor:
    """Compute the term `g` of this module's docstring, which is subtracted from a prompt's prediction.

    Args:
        own: Prediction for the prompt.
        null: Prediction for the negative or the empty one.
        concept: Prediction for the concept.
        momentum: `nu`; none yet when left out.
        figures: See `SafetyGuidance.figures`.
    """
    scale, threshold, momentum_scale, _ = figures.tolist()
    away = own - concept
    share = torch.where(away < threshold, (scale * away.abs()).clamp(max=1), torch.zeros_like(away))
    g = share * (concept - null)
    return g if momentum is None else g + momentum_scale * momentum
