"""A small sparse autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from erasure.sae import SAEConfig, SparseAutoencoder


@pytest.fixture
def make_sae() -> Callable[..., Any]:
    """Makes a sparse autoencoder of random weights, thresholds 0.8."""

    def make(architecture: str = "topk", d_in: int = 12, d_sae: int = 40, k: int = 5) -> Any:
        sae = SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=d_sae, k=k, architecture=architecture))
        generator = torch.Generator().manual_seed(1)
        sae.initialise(torch.randn(200, d_in, generator=generator), generator)
        with torch.no_grad():
            sae.W_enc.add_(0.1 * torch.randn(d_in, d_sae, generator=generator))
            sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
        sae.threshold.fill_(0.8)
        return sae.requires_grad_(False)

    return make
