"""A tiny SDXL pipeline beside the tiny pipeline of all tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_xl_original(tiny_pipe_original: Any, tiny_tokenizer: Any) -> Any:
    """A `StableDiffusionXLPipeline` with random weights: read it, never change it."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, use_linear_projection=True,
    )  # fmt: skip
    first = tiny_pipe_original.text_encoder
    config = CLIPTextConfig(**first.config.to_dict() | {"projection_dim": 32})
    pipe = StableDiffusionXLPipeline(
        vae=copy.deepcopy(tiny_pipe_original.vae), unet=unet, text_encoder=copy.deepcopy(first),
        text_encoder_2=CLIPTextModelWithProjection(config), tokenizer=tiny_tokenizer, tokenizer_2=tiny_tokenizer,
        scheduler=copy.deepcopy(tiny_pipe_original.scheduler), add_watermarker=False,
    )  # fmt: skip
    for component in (pipe.unet, pipe.text_encoder_2):
        component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["sd", "sdxl"])
def stock(request: pytest.FixtureRequest, tiny_pipe_original: Any, tiny_xl_original: Any) -> Any:
    """A tiny text-to-image pipeline of each UNet family, that the test may change."""
    return copy.deepcopy(tiny_pipe_original if request.param == "sd" else tiny_xl_original)
