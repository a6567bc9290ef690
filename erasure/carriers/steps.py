"""Step functions with useful gradients: exact steps in the forward pass, smooth curves in the backward pass.

A gate is a step function with derivative zero. Gradient-based attacks would get no information about it, so it would
hide a weakness instead of resisting ("masked gradients": Athalye et al. 2018, arXiv 1802.00420, whose remedy is used
here).
"""

from __future__ import annotations

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """Give one tensor, and pass gradients on to another of the same shape."""

    @staticmethod
    def forward(ctx: object, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Give `value` unchanged, with the gradients of `surrogate`, which has the same shape."""
    return _StraightThrough.apply(value.detach(), surrogate)


def smooth_step(score: Tensor, level: Tensor, least: Tensor | float) -> Tensor:
    """Compute a smooth curve in 0-1 to replace `score >= level`; it is one half at the level.

    `sigmoid((score - level) / width)` with the width, a constant for gradients, of the distance from the level. So the
    slope tells the way to the level from however far: `0.197 / distance`, where a fixed width would leave nothing.

    Args:
        score: Any shape; entries of -inf stand for what cannot open a gate, and give 0.
        level: Broadcasts with it; -inf is a gate that is always open, and gives 1.
        least: The least width, in the score's unit.
    """
    distance = score - level
    near = distance.isfinite()
    # What is infinitely far has no slope, and must not reach a division: its gradient would be NaN.
    finite = torch.where(near, distance, 0.0)
    width = finite.detach().abs().clamp_min(least)
    return torch.where(near, torch.sigmoid(finite / width), (score >= level).to(distance.dtype))


def seeing_jump(latents: Tensor, before: Tensor, threshold: Tensor) -> Tensor:
    """Compute the latents of a JumpReLU, with gradients for silent latents too.

    The slope is 1 where a latent fires, as it is. Where it is silent, it is that of a softplus around the threshold,
    `sigmoid((before - threshold) / spread)`, with the spread of the latent over the tokens at hand.

    Args:
        latents: `(batch, tokens, features)`.
        before: The same before the jump.
        threshold: `(features,)`.
    """
    above = before - threshold.clamp_min(0)
    fixed = above.detach()
    spread = fixed.flatten(0, -2).std(0, correction=0).clamp_min(1e-6)
    slope = torch.where(latents.detach() > 0, 1.0, torch.sigmoid(fixed / spread))
    return straight_through(latents, before * slope)
