"""Targets and losses, as pure functions of predictions in the denoiser's own parametrisation.

All targets are linear in the predictions, so they hold for epsilon, v and flow prediction alike.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def negative_guidance(base: Tensor, erase: Tensor, against: Tensor, eta: float | Tensor) -> Tensor:
    """`base - eta (erase - against)`, shaped as they are.

    ESD (Gandikota et al. 2023, eq. 7) has `base = against = the prediction of the empty prompt`, so that `eta = 0`
    matches the empty prompt and `eta = 1` goes as far to the other side. Code that takes `base = erase` instead, as
    the diffusers version of ESD does, needs `eta + 1` for the same target.

    Args:
        base: Teacher's prediction to start from.
        erase: For the prompt with the concept.
        against: What the concept is told from.
        eta: Negative guidance in the paper's convention; a tensor is one that broadcasts.
    """
    return base - eta * (erase - against)


def matching(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in float32."""
    return F.mse_loss(prediction.float(), target.float())
