"""Tiny denoisers of every make with random weights, and a call of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

H, W = 12, 8
"""Rows and columns of the latents."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tiny_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip


def tiny_sd3() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval().requires_grad_(False)  # fmt: skip


def tiny_flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    ).eval().requires_grad_(False)  # fmt: skip


def denoise(model: Any, batch: int = 2, seed: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    text, image = random(batch, 5, 16, seed=seed + 1, dtype=dtype), random(batch, 4, H, W, seed=seed, dtype=dtype)
    if isinstance(model, UNet2DConditionModel):
        return model(image, torch.tensor(500), encoder_hidden_states=text).sample
    pooled, t = random(batch, 16, seed=seed + 2, dtype=dtype), torch.full((batch,), 0.5, dtype=dtype)
    if isinstance(model, SD3Transformer2DModel):
        return model(image, text, pooled, t * 1000).sample
    grid = torch.stack(torch.meshgrid(torch.arange(H // 2), torch.arange(W // 2), indexing="ij"), -1).view(-1, 2)
    places = torch.cat([torch.zeros(len(grid), 1), grid], 1)
    return model(
        random(batch, H * W // 4, 4, seed=seed, dtype=dtype), encoder_hidden_states=text,
        pooled_projections=pooled, timestep=t, img_ids=places, txt_ids=torch.zeros(5, 3),
    ).sample  # fmt: skip


DENOISERS: dict[str, Callable[[], Any]] = {"unet": tiny_unet, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="session")
def denoisers() -> dict[str, Callable[[], Any]]:
    """Makes tiny denoisers: `denoisers["flux"]()`."""
    return DENOISERS


@pytest.fixture(scope="session")
def call() -> Callable[..., Tensor]:
    """Runs a denoiser on random latents of 12x8 and five tokens of text: `call(model, batch=2, seed=0)`."""
    return denoise
