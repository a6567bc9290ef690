"""Rectified flow: what the trainings of Canvas's transformers share."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


def levels(count: int, shift: float) -> Tensor:
    """Noise levels in 0-1 of a logit-normal distribution, shifted towards noise, `(count,)` (Esser et al. 2024).

    Args:
        count: How many.
        shift: 1 shifts nothing; the sampler should shift by the same.
    """
    level = torch.sigmoid(torch.randn(count))
    return shift * level / (1 + (shift - 1) * level)


def noised(clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents, and the velocity that a model should tell from them, each of the shape of `clean`.

    Args:
        clean: `(batch, channels, rows, columns)`.
        noise: Of the same shape.
        level: `(batch,)` in 0-1.
    """
    share = level[:, None, None, None]
    return (1 - share) * clean + share * noise, noise - clean


def initialise(network: ModelMixin) -> None:
    """Start every block as the identity and the output at zero (adaLN-zero, Peebles and Xie 2023).

    diffusers gives the modulations the usual random weights, from which a small model learns badly.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def optimisers(network: ModelMixin, matrices: float = 0.02, others: float = 2e-3) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks but for their modulations, AdamW for all else.

    Args:
        network: A transformer.
        matrices: Learning rate of Muon.
        others: Learning rate of AdamW.
    """
    by_muon, by_adam = [], []
    for name, parameter in network.named_parameters():
        inside = "transformer_blocks." in name and "norm" not in name and parameter.ndim == 2
        (by_muon if inside else by_adam).append(parameter)
    return {
        "muon": torch.optim.Muon(by_muon, lr=matrices, momentum=0.95, weight_decay=0.0),
        "optimiser": torch.optim.AdamW(by_adam, lr=others, betas=(0.9, 0.99), weight_decay=1e-3, fused=True),
    }
