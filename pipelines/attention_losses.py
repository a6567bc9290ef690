"""Losses on the cross-attention maps of a prompt's subjects, as pure functions with one value for each sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur


def overlap(first: Tensor, second: Tensor) -> Tensor:
    r"""Compute $\sum \min(a, b) / \sum (a + b)$ over the last two axes: 0 for disjoint maps, 0.5 for equal ones."""
    return torch.minimum(first, second).sum((-2, -1)) / (first + second).sum((-2, -1)).clamp_min(1e-8)


def segregation(maps: Tensor, present: Tensor) -> Tensor:
    r"""Compute how much the subjects' maps overlap (A-STAR, Agarwal et al. 2023, Eq. 2).

    $$L_{seg} = \sum_{m > n} \frac{\sum_{ij} \min(A^m, A^n)_{ij}}{\sum_{ij} (A^m + A^n)_{ij}}$$

    Args:
        maps: `(samples, subjects, rows, columns)`, not negative.
        present: `(samples, subjects)` bool; a sample may have fewer subjects than others.

    Returns:
        `(samples,)`, 0 to half the number of pairs.
    """
    pairs = overlap(maps[:, :, None], maps[:, None])
    both = present[:, :, None] & present[:, None]
    return (pairs * both.tril(-1)).sum((1, 2))


def retention(maps: Tensor, kept: Tensor, present: Tensor) -> Tensor:
    r"""Compute how far the subjects' maps are from the places that they must keep (A-STAR, Eq. 3).

    $$L_{ret} = \sum_m \left[ 1 - \frac{\sum_{ij} \min(A^m, B^m)_{ij}}{\sum_{ij} (A^m + B^m)_{ij}} \right]$$

    Args:
        maps: `(samples, subjects, rows, columns)`, not negative.
        kept: B, the same shape, constants in 0-1: where each subject was at the step before, or where it should be.
        present: `(samples, subjects)` bool.

    Returns:
        `(samples,)`, half to the whole number of subjects.
    """
    return ((1 - overlap(maps, kept)) * present).sum(1)


def excitation(maps: Tensor, present: Tensor) -> Tensor:
    """Compute what the most neglected subject's maximum lacks to 1 (Attend-and-Excite, Chefer et al. 2023).

    `max_m max(0, 1 - max_ij A^m_ij)`, `(samples,)`; arguments as in `segregation`.
    """
    lacking = (1 - maps.amax((-2, -1))).clamp_min(0)
    return lacking.masked_fill(~present, 0).amax(1)


def where_high(maps: Tensor, threshold: float) -> Tensor:
    """Mark where a map is above a share of its maximum, 1 or 0: the B of `retention`, without gradient."""
    return (maps > threshold * maps.amax((-2, -1), keepdim=True)).to(maps.dtype).detach()


def smoothed(maps: Tensor, sigma: float = 2**-0.5) -> Tensor:
    """Smooth maps by a 3x3 Gaussian. Attend-and-Excite's code says 0.5 and computes `exp(-(x / 2 sigma)^2)`: 0.707."""
    return gaussian_blur(maps, [3, 3], [sigma, sigma])


def ranged(maps: Tensor) -> Tensor:
    """Scale each map `(..., rows, columns)` to 0-1, differentiable."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-8)


def rivalled(maps: Tensor, words: Tensor, temperature: float = 100.0) -> Tensor:
    """Compute the softmax of maps over a prompt's tokens (Attend-and-Excite's code: factor 100).

    Args:
        maps: `(samples, tokens, rows, columns)`.
        words: Tokens of the softmax, `(samples, tokens)` bool, without start, end and padding.
        temperature: Factor of the maps.
    """
    scores = (temperature * maps).masked_fill(~words[:, :, None, None], -torch.inf)
    return F.softmax(scores, 1)
