"""Targets and losses, as pure functions of predictions in the denoiser's own parametrisation.

All targets are linear in the predictions, so they hold for epsilon, v and flow prediction alike.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def negative_guidance(base: Tensor, erase: Tensor, against: Tensor, eta: float | Tensor) -> Tensor:
    """Compute ESD's target `base - eta (erase - against)`, shaped as its arguments.

    ESD (Gandikota et al. 2023, eq. 7) has `base = against = the prediction of the empty prompt`, so `eta = 0` gives
    the prediction of the empty prompt, and `eta = 1` moves it away from the concept by the whole difference. Code with
    `base = erase`, such as the diffusers version of ESD, needs `eta + 1` for the same target.

    Args:
        base: Teacher's prediction from which the target starts.
        erase: Teacher's prediction for the prompt with the concept.
        against: Prediction that is subtracted from the concept's.
        eta: Strength of negative guidance in the paper's convention; a number, or a tensor that broadcasts.
    """
    return base - eta * (erase - against)


def matching(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error in float32."""
    return F.mse_loss(prediction.float(), target.float())
