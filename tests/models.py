"""Tiny pipelines and their parts: real classes with random weights, made offline.

Classes are imported where they are made, because those of one family take seconds.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = (
    "a", "an", "photo", "picture", "image", "of", "in", "style", "drawing", "the", "and", "on", "background", "cat",
    "kitten", "dog", "car", "apple", "house", "gun", "ink", "noto", "pixel", "van", "gogh", "monet", "painting",
    "animal", "white", "blue",
)  # fmt: skip
"""Words that the tiny tokenizer has a token of its own for; others fall apart into letters."""
TINY = Path(__file__).parent / "tiny"
"""Folder whose `canvas.json` declares images of 32x32 and prompts of 32 tokens: T5 pads to 512 elsewhere."""


def make_tiny_tokenizer() -> Any:
    """A `CLIPTokenizer` with letters, digits and `WORDS`, made offline."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
            parts[-2:] = ["".join(pair)]
            if parts[-1] not in tokens:
                tokens.append(parts[-1])
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def make_tiny_clip(tokenizer: Any, projected: bool = False, seed: int | None = None) -> Any:
    """A CLIP text encoder of width 32 and four blocks with random weights, with or without its projection."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if seed is not None:
        torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=32,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval().requires_grad_(False)


def make_tiny_t5(seed: int = 4, width: int = 32) -> Any:
    """A T5 encoder of three blocks with random weights, and a tokeniser of letters and `WORDS`."""
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["▁", *(f"▁{word}" for word in WORDS), "cat", "s", *string.ascii_lowercase, *string.punctuation]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores = [(piece, -float(place)) for place, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = T5Tokenizer(vocab=[*special, *scores], extra_ids=0)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval().requires_grad_(False), tokenizer


def make_tiny_vae(shift: float | None = None) -> Any:
    """An `AutoencoderKL` of four channels that halves the sides of images, with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=32,
        shift_factor=shift,
    )  # fmt: skip


def flow_scheduler(**options: Any) -> Any:
    """The sampler of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def still(pipe: Any) -> Any:
    """A pipeline whose networks do not train and which shows no progress."""
    import torch

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def declared(pipe: Any) -> Any:
    """A pipeline whose networks are still, and which declares what `TINY` says."""
    pipe.register_to_config(_name_or_path=str(TINY))
    return still(pipe)


def make_tiny_pipe(seed: int = 0) -> Any:
    """A `StableDiffusionPipeline` of 16x16 latents and 32x32 images with random weights."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    vae = make_tiny_vae()
    text_encoder = make_tiny_clip(tokenizer)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return still(pipe)


def make_tiny_latent_consistency(seed: int = 0) -> Any:
    """The tiny pipeline with a UNet that is told its guidance, and its sampler."""
    from diffusers import LCMScheduler, UNet2DConditionModel

    pipe = make_tiny_pipe(seed)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    pipe.unet.eval().requires_grad_(False)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def make_tiny_xl(seed: int = 0) -> Any:
    """A `StableDiffusionXLPipeline` of 16x16 latents and 32x32 images with random weights."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    plain = make_tiny_pipe(seed)
    torch.manual_seed(seed + 1)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, use_linear_projection=True,
    )  # fmt: skip
    tokenizer = make_tiny_tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=plain.vae, unet=unet.eval().requires_grad_(False), text_encoder=plain.text_encoder,
        text_encoder_2=make_tiny_clip(tokenizer, projected=True), tokenizer=plain.tokenizer, tokenizer_2=tokenizer,
        scheduler=plain.scheduler, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_tiny_flux(seed: int = 0, guidance_embeds: bool = True) -> Any:
    """A `FluxPipeline` of 16x16 latents of one value and 32x32 images with random weights, distilled for guidance."""
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tokenizer = make_tiny_tokenizer()
    clip = make_tiny_clip(tokenizer)
    t5, pieces = make_tiny_t5(seed + 4)
    return declared(FluxPipeline(
        vae=make_tiny_vae(0.1), transformer=transformer, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5,
        tokenizer_2=pieces, scheduler=flow_scheduler(use_dynamic_shifting=True),
    ))  # fmt: skip


def make_tiny_chroma(seed: int = 0) -> Any:
    """A `ChromaPipeline` of 16x16 latents and 32x32 images with random weights."""
    import torch
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    t5, pieces = make_tiny_t5(seed + 4)
    return declared(ChromaPipeline(
        vae=make_tiny_vae(0.1), transformer=transformer, text_encoder=t5, tokenizer=pieces,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
    ))  # fmt: skip


def make_tiny_sd3(seed: int = 0) -> Any:
    """A `StableDiffusion3Pipeline` of 16x16 latents and 32x32 images with random weights, T5 included."""
    import torch
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=80, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    first, second = make_tiny_tokenizer(), make_tiny_tokenizer()
    clips = [make_tiny_clip(words, projected=True) for words in (first, second)]
    t5, pieces = make_tiny_t5(seed + 4, width=80)
    return declared(StableDiffusion3Pipeline(
        vae=make_tiny_vae(0.1), transformer=transformer, text_encoder=clips[0], tokenizer=first,
        text_encoder_2=clips[1], tokenizer_2=second, text_encoder_3=t5, tokenizer_3=pieces,
        scheduler=flow_scheduler(shift=3.0),
    ))  # fmt: skip


MODELS: dict[str, Callable[..., Any]] = {
    "stable-diffusion": make_tiny_pipe,
    "stable-diffusion-xl": make_tiny_xl,
    "stable-diffusion-3": make_tiny_sd3,
    "flux": make_tiny_flux,
    "chroma": make_tiny_chroma,
    "latent-consistency": make_tiny_latent_consistency,
}
"""Makes tiny pipelines with random weights: of every family, by its name, and of kinds that can do less."""


def add_tiny_ip_adapter(pipe: Any) -> dict[str, Any]:
    """Load an IP-Adapter with random weights through diffusers' loader; gives the attention processors."""
    import torch

    generator = torch.Generator().manual_seed(5)
    sites = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    adapter = {}
    for index, name in enumerate(sites):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        width, dim = attention.to_k.out_features, attention.to_k.in_features
        for part in ("to_k_ip", "to_v_ip"):
            adapter[f"{2 * index + 1}.{part}.weight"] = torch.randn(width, dim, generator=generator) * 0.1
    dim = pipe.unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * dim, 16, generator=generator), "proj.bias": torch.zeros(4 * dim),
        "norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim),
    }  # fmt: skip
    pipe.unet._load_ip_adapter_weights([{"ip_adapter": adapter, "image_proj": projection}])
    return dict(pipe.unet.attn_processors)


def teach_token(pipe: Any, *words: str, token: str = "<my-pet>", suffix: str = "") -> None:
    """Load a learned token through diffusers' loader: a vector for each word, near to that of the word's last token.

    `suffix` chooses the encoder and its tokeniser: `_2` is the second.
    """
    import torch

    tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
    table = encoder.get_input_embeddings().weight.detach()
    rows = table[[tokenizer(word, add_special_tokens=False).input_ids[-1] for word in words]]
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    vectors = rows + 0.05 * rows.std() * noise
    pipe.load_textual_inversion(vectors, token=token, tokenizer=tokenizer, text_encoder=encoder)
