"""Models of the size that people use, with random weights: what they cost does not depend on what they have learned.

Sizes are those of the released models' configurations, written down from memory of them and from the defaults of the
classes in diffusers. A fraction of the width makes small models of the same shape.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from erasure import assets

if TYPE_CHECKING:
    from collections.abc import Sequence

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORDS = ("a", "photo", "picture", "image", "of", "the", "in", "and", "cat", "dog", "animal", "house", "car", "tree")
"""Words that the tokeniser of the T5 has pieces for; all others fall apart into letters."""


@dataclass(frozen=True)
class Size:
    """How large the networks are made and where.

    Args:
        width: Share of the real width and depth; 1 for the real size.
        device: Where they stand.
        dtype: Precision of their weights.
    """

    width: float
    device: torch.device
    dtype: torch.dtype

    def heads(self, real: int) -> int:
        """Number of attention heads, of which there are as many as the width allows."""
        return max(1, round(self.width * real))

    def channels(self, *real: int) -> tuple[int, ...]:
        """Channels of convolutions, in groups of 32."""
        return tuple(max(1, round(self.width * one / 32)) * 32 for one in real)

    def layers(self, real: int) -> int:
        """Number of like layers on top of one another: two at least, where the real model has them."""
        return min(real, max(2, round(self.width * real)))

    def made(self, network: type[nn.Module], *config: object, **sizes: object) -> nn.Module:
        """A network with random weights, which exists on its device only."""
        # Buffers hold tables of positions, which random numbers would not do for.
        with init_empty_weights(include_buffers=False):
            module = network(*config, **sizes)
        randomised(module, self.device, self.dtype)
        if isinstance(module, PreTrainedModel):
            module.tie_weights()
        return module.to(self.device).eval().requires_grad_(False)


def randomised(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give parameters random values on a device: matrices that keep lengths, biases of 0, norms of 1."""
    for layer in module.modules():
        for name, empty in list(layer.named_parameters(recurse=False)):
            value = torch.zeros(empty.shape, device=device)
            if empty.ndim > 1:
                value.normal_(std=empty[0].numel() ** -0.5)
            elif name == "weight":
                value.fill_(1)
            setattr(layer, name, nn.Parameter(value.to(dtype), requires_grad=False))


# Parts that several families have ------------------------------------------------------------------------------------


def clip(size: Size, heads: int, layers: int, projected: bool, activation: str = "quick_gelu") -> PreTrainedModel:
    """A text encoder of CLIP's kind; heads are 64 wide."""
    width = 64 * size.heads(heads)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=size.layers(layers),
        num_attention_heads=size.heads(heads), max_position_embeddings=77, hidden_act=activation, projection_dim=width,
        bos_token_id=words().bos_token_id, eos_token_id=words().eos_token_id, pad_token_id=words().pad_token_id,
    )  # fmt: skip
    return size.made(CLIPTextModelWithProjection if projected else CLIPTextModel, config)


def clip_large(size: Size, projected: bool = False) -> PreTrainedModel:
    """CLIP ViT-L/14's text encoder."""
    return clip(size, 12, 12, projected)


def clip_big(size: Size) -> PreTrainedModel:
    """OpenCLIP ViT-bigG/14's text encoder."""
    return clip(size, 20, 32, True, "gelu")


def words() -> CLIPTokenizer:
    """CLIP's way of making tokens, with the embedded model's vocabulary: 77 of them."""
    tokenizer = CLIPTokenizer.from_pretrained(assets.path("canvas-sd") / "tokenizer")
    tokenizer.model_max_length = 77
    return tokenizer


def t5(size: Size) -> PreTrainedModel:
    """The encoder of T5 v1.1 XXL."""
    width = 64 * size.heads(64)
    config = T5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=width // 2 * 5, num_layers=size.layers(24),
        num_heads=size.heads(64), feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return size.made(T5EncoderModel, config)


def pieces() -> T5Tokenizer:
    """T5's way of making tokens, with a vocabulary of `WORDS` and letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    known = dict.fromkeys(["▁", *(f"▁{word}" for word in WORDS), *string.ascii_letters, *string.punctuation])
    return T5Tokenizer(vocab=[*special, *((piece, -float(place)) for place, piece in enumerate(known))], extra_ids=0)


def autoencoder(size: Size, channels: int, scale: float, shift: float | None = None) -> nn.Module:
    """Stable Diffusion's autoencoder, with 4 channels of latents or 16."""
    own = {} if shift is None else {"use_quant_conv": False, "use_post_quant_conv": False}
    return size.made(
        AutoencoderKL, block_out_channels=size.channels(128, 256, 512, 512), latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        scaling_factor=scale, shift_factor=shift, **own,
    )  # fmt: skip


# Families ------------------------------------------------------------------------------------------------------------


def stable_diffusion(size: Size) -> DiffusionPipeline:
    """Stable Diffusion 1.5: a UNet of 860 million parameters."""
    encoder = clip_large(size)
    unet = size.made(
        UNet2DConditionModel, sample_size=64, block_out_channels=size.channels(320, 640, 1280, 1280),
        cross_attention_dim=encoder.config.hidden_size, attention_head_dim=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=autoencoder(size, 4, 0.18215), text_encoder=encoder, tokenizer=words(), unet=unet,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(size: Size) -> DiffusionPipeline:
    """Stable Diffusion XL: a UNet of 2.6 billion parameters."""
    first, second = clip_large(size), clip_big(size)
    channels = size.channels(320, 640, 1280)
    heads = [max(1, one // 64) for one in channels]
    unet = size.made(
        UNet2DConditionModel, sample_size=128, block_out_channels=channels, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, size.layers(10)), attention_head_dim=heads,
        cross_attention_dim=first.config.hidden_size + second.config.hidden_size, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=second.config.projection_dim + 6 * 256,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=autoencoder(size, 4, 0.13025), text_encoder=first, text_encoder_2=second, tokenizer=words(),
        tokenizer_2=words(), unet=unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip


def stable_diffusion_3(size: Size) -> DiffusionPipeline:
    """Stable Diffusion 3 medium: a transformer of 2 billion parameters, and T5 XXL."""
    first, second, third = clip_large(size, projected=True), clip_big(size), t5(size)
    heads = size.heads(24)
    transformer = size.made(
        SD3Transformer2DModel, sample_size=128, patch_size=2, in_channels=16, out_channels=16,
        num_layers=size.layers(24), attention_head_dim=64, num_attention_heads=heads, pos_embed_max_size=192,
        caption_projection_dim=64 * heads, joint_attention_dim=third.config.d_model,
        pooled_projection_dim=first.config.projection_dim + second.config.projection_dim,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=autoencoder(size, 16, 1.5305, 0.0609), text_encoder=first, text_encoder_2=second, text_encoder_3=third,
        tokenizer=words(), tokenizer_2=words(), tokenizer_3=pieces(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(size: Size) -> DiffusionPipeline:
    """FLUX.1 dev: a transformer of 12 billion parameters that is told its guidance, and T5 XXL."""
    first, second = clip_large(size), t5(size)
    transformer = size.made(
        FluxTransformer2DModel, num_layers=size.layers(19), num_single_layers=size.layers(38),
        num_attention_heads=size.heads(24), joint_attention_dim=second.config.d_model,
        pooled_projection_dim=first.config.hidden_size, guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        vae=autoencoder(size, 16, 0.3611, 0.1159), text_encoder=first, text_encoder_2=second, tokenizer=words(),
        tokenizer_2=pieces(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
    )  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model and how it is usually drawn with."""

    make: Callable[[Size], DiffusionPipeline]
    pixels: int
    """Pixels along a side of a picture."""
    steps: int
    guidance: float
    tokens: int | None = None
    """Tokens that T5 pads prompts to; `None` for a model without T5."""


MODELS: Mapping[str, Model] = {
    "sd15": Model(stable_diffusion, 512, 50, 7.5),
    "sdxl": Model(stable_diffusion_xl, 1024, 30, 5.0),
    "sd3": Model(stable_diffusion_3, 1024, 28, 7.0, 256),
    "flux": Model(flux, 1024, 28, 3.5, 512),
}


def parameters(pipe: DiffusionPipeline) -> dict[str, float]:
    """Millions of parameters of each network of a pipeline."""
    parts: Sequence[tuple[str, object]] = sorted(pipe.components.items())
    return {
        name: round(sum(p.numel() for p in part.parameters()) / 1e6, 3)
        for name, part in parts
        if isinstance(part, nn.Module)
    }
