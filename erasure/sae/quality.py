"""How well an autoencoder describes activations that it was not trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from erasure.errors import WrongBaseError
from erasure.sae.model import SparseAutoencoder
from erasure.sae.training import Stream


class Quality(NamedTuple):
    """Figures over a sample of tokens."""

    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 no better than the mean."""
    latents_per_token: float
    """Latents that fire on a token, on average."""
    silent: float
    """Share of latents that fired on no token of the sample."""
    tokens: int
    """Size of the sample."""


@torch.no_grad()
def quality(sae: SparseAutoencoder, stream: Stream, steps: int = 20) -> Quality:
    """Measure on `steps` batches of a stream.

    Raises:
        WrongBaseError: The activations are of another width.
    """
    batches = [stream(step) for step in range(steps)]
    sample = torch.cat(batches)
    if sample.shape[1] != sae.config.d_in:
        raise WrongBaseError(
            f"the autoencoder is for activations of width {sae.config.d_in}, these have {sample.shape[1]}: it belongs "
            "to another model or another tower"
        )
    mean = sample.mean(0)
    left = total = active = 0.0
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=sample.device)
    for x in batches:
        latents = sae.encode(x)
        left += float((x - sae.decode(latents)).pow(2).sum())
        total += float((x - mean).pow(2).sum())
        active += float((latents > 0).sum())
        fired |= (latents > 0).any(0)
    return Quality(left / total, active / len(sample), float((~fired).float().mean()), len(sample))
