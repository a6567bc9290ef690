"""Options of a sparse autoencoder's training. No import of torch here: the command line makes flags of them."""

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
    """Latents per token."""
    batch_topk: bool = True
    """Keep the k x tokens largest latents of a whole batch, so that rich tokens get more of them, and use thresholds
    (JumpReLU) afterwards (Bussmann et al. 2024, arXiv 2412.06410). Without it, exactly k of every token."""
    steps: Count = 2000
    """Optimiser steps."""
    learning_rate: Positive = 4e-4
    """Peak of Adam's learning rate."""
    warmup: CountOrZero = 100
    """Steps of linear warm-up."""
    decay: ZeroToOne = 0.2
    """Share of the run over which the learning rate falls to zero at its end."""
    aux_k: Count | None = None
    """Dead latents that reconstruct the error of a token; half of d_in when left out (Gao et al. 2024, A.2)."""
    aux_coefficient: NotNegative = 1 / 32
    """Weight of that loss (Gao et al. 2024)."""
    dead_after: CountOrZero = 200_000
    """Tokens without firing after which a latent counts as dead."""
    threshold_decay: Decay = 0.99
    """Decay of the running mean of the least latent kept, which becomes the threshold."""
    clip: Positive = 1.0
    """Greatest norm of the gradient."""
    save_every: Count = 500
    """Steps between two checkpoints."""
    seed: Seed = 0
    """Seeds the initial directions."""

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow.

        Raises:
            OptionError: A value outside its range, or more latents per token than there are.
        """
        super().__post_init__()
        if self.k > self.d_sae:
            self.refuse("k", self.k, f"a whole number from 1 to 'd_sae', which is {self.d_sae}")
