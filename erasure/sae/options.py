"""Options of a sparse autoencoder's training. This module does not import torch, so that the command line is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from erasure.options import Count, CountOrZero, Decay, NotNegative, Options, Positive, Seed, ZeroToOne


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Options of an autoencoder's training."""

    name: ClassVar[str] = "training of an autoencoder"

    d_sae: Count = 8192
    """Number of latents."""
    k: Count = 32
    """Number of active latents per token."""
    batch_topk: bool = True
    """Keep the k x tokens largest latents of a whole batch, so that tokens can have different numbers of them, and
    use thresholds (JumpReLU) afterwards (Bussmann et al. 2024, arXiv 2412.06410). When off, keep exactly k latents
    of every token."""
    steps: Count = 2000
    """Number of optimiser steps."""
    learning_rate: Positive = 4e-4
    """Peak learning rate of Adam."""
    warmup: CountOrZero = 100
    """Number of steps in which the learning rate rises linearly to its peak."""
    decay: ZeroToOne = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to zero."""
    aux_k: Count | None = None
    """Number of dead latents that are trained to reconstruct the error of a token; half of d_in when left out (Gao
    et al. 2024, A.2)."""
    aux_coefficient: NotNegative = 1 / 32
    """Weight of the dead latents' loss (Gao et al. 2024)."""
    dead_after: CountOrZero = 200_000
    """Number of tokens without firing after which a latent counts as dead."""
    threshold_decay: Decay = 0.99
    """Decay of the running mean of the smallest kept latent, which becomes the threshold."""
    clip: Positive = 1.0
    """Largest norm of the gradient, to which longer ones are clipped."""
    save_every: Count = 500
    """Number of steps between two checkpoints."""
    seed: Seed = 0
    """Seed of the initial directions."""

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow.

        Raises:
            OptionError: A value is outside of its range, or k is larger than d_sae.
        """
        super().__post_init__()
        if self.k > self.d_sae:
            self.refuse("k", self.k, f"a whole number from 1 to 'd_sae', which is {self.d_sae}")
