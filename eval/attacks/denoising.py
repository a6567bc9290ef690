"""The loss of attacks that look for words with which the erased model denoises an image of the concept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone, Conditioning


def denoising_losses(backbone: Backbone, given: Sequence[tuple[Conditioning, Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """`denoising_loss` of several prompts in one batch.

    Args:
        backbone: The model.
        given: What it is told, the clean latent, noise and levels of each; all with as many draws.
    """
    if len(given) == 1:
        return [denoising_loss(backbone, *given[0])]
    told, clean, noise, t = zip(*given, strict=True)
    rows = [one.expand(len(own), -1, -1, -1) for one, own in zip(clean, noise, strict=True)]
    found, target = predicted(backbone, Conditioning.cat(told), torch.cat(rows), torch.cat(noise), torch.cat(t))
    squares = (found - target).square().flatten(1).mean(1)
    return list(squares.unflatten(0, (len(given), -1)).mean(1))


def denoising_loss(backbone: Backbone, told: Conditioning, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the model's prediction; differentiable.

    Args:
        backbone: The model, with whatever is in force.
        told: What it is told, `draws` times.
        clean: Latent of an image, `(1, channels, h, w)`, or those of `draws` images.
        noise: `(draws, channels, h, w)`, standard normal.
        t: Noise levels `(draws,)`.
    """
    return F.mse_loss(*predicted(backbone, told, clean.expand(len(noise), -1, -1, -1), noise, t))


def predicted(
    backbone: Backbone, told: Conditioning, clean: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model predicts and what it should, `(rows, channels, h, w)` float32; arguments have a row of each."""
    noise, t = noise.to(clean), t.to(clean.device)
    way = backbone.parametrisation
    found = backbone.predict(way.noised(clean, noise, t), t, told)
    return found.float(), way.target(clean, noise, t).float()
