"""Fixtures that several folders share: tiny pipelines and autoencoders, real classes with random weights."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import string
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Benchmarks stand in the checkout and are not installed: they are found there, behind whatever is.
sys.path.append(str(Path(__file__).parents[1]))
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each take every core wait for one another. Programs that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: it would go through it again with every copied pipeline."""
    gc.collect()
    gc.freeze()
    # It comes after every 700 new objects by itself, which is several times for each copied pipeline.
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def disk() -> Iterator[None]:
    """Files of tests need to outlast no power cut: nobody waits for the disk, but a closed file is still refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """A worker among several has one thread, whatever imported torch ahead of this file."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep what they cache to themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERASURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


WORDS = (
    "a", "an", "photo", "picture", "image", "of", "in", "style", "drawing", "the", "and", "on", "background", "cat",
    "kitten", "dog", "car", "apple", "house", "gun", "ink", "noto", "pixel", "van", "gogh", "monet", "painting",
    "animal", "white", "blue",
)  # fmt: skip
"""Words that the tiny tokenizer has a token of its own for; others fall apart into letters."""


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


TINY = Path(__file__).parent / "tiny"
"""Folder whose `canvas.json` declares images of 32x32 and prompts of 32 tokens: T5 pads to 512 elsewhere."""


def declared(pipe: Any) -> Any:
    """A pipeline whose networks are still, and which declares what `TINY` says."""
    pipe.register_to_config(_name_or_path=str(TINY))
    return still(pipe)


def still(pipe: Any) -> Any:
    """A pipeline whose networks do not train and which shows no progress."""
    import torch

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The tokeniser of the tiny pipeline: read it, never change it."""
    return make_tiny_tokenizer()


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


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Callable[..., Any]]:
    """Makes tiny pipelines of a family: `tiny_models["stable-diffusion"](seed=1)`."""
    return MODELS


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[..., Any]:
    """Makes CLIP text encoders: `tiny_clip(tokenizer, projected=True, seed=2)`."""
    return make_tiny_clip


@pytest.fixture(scope="session")
def tiny_t5() -> Callable[..., Any]:
    """Makes a T5 encoder and its tokeniser: `encoder, tokenizer = tiny_t5()`."""
    return make_tiny_t5


@pytest.fixture(scope="session")
def tiny_pipe_factory() -> Callable[..., Any]:
    """Makes tiny pipelines: `tiny_pipe_factory(seed=1)` has other weights."""
    return make_tiny_pipe


@pytest.fixture(scope="session")
def tiny_pipe_original() -> Any:
    """The tiny pipeline of the session: read it, never change it."""
    return make_tiny_pipe()


PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType)
"""Kinds of values that copies share."""


def copied_module(module: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a network, as `copy.deepcopy` makes it but in a fifth of the time.

    Most of what a module holds is empty tables of hooks and plain values, which need no look at what they are.
    """
    if id(module) in memo:
        return memo[id(module)]
    made = memo[id(module)] = module.__new__(type(module))
    for name, value in vars(module).items():
        kind = type(value)
        if kind in PLAIN:
            made.__dict__[name] = value
        elif kind in (dict, OrderedDict, set, list) and not value:
            made.__dict__[name] = memo[id(value)] = kind()
        elif name == "_modules" and kind is dict:
            parts = {key: part if part is None else copied_module(part, memo) for key, part in value.items()}
            made.__dict__[name] = memo[id(value)] = parts
        else:
            made.__dict__[name] = copy.deepcopy(value, memo)
    return made


def copied(pipe: Any) -> Any:
    """A deep copy of a pipeline, quickly: half of the time of many tests is spent on these."""
    import torch

    memo: dict[int, Any] = {}
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            copied_module(part, memo)
    return copy.deepcopy(pipe, memo)


@pytest.fixture(scope="session")
def copy_of() -> Callable[[Any], Any]:
    """Copies a pipeline that a test may not change: `copy_of(tiny_pipe_original)`."""
    return copied


@pytest.fixture
def tiny_pipe(tiny_pipe_original: Any) -> Any:
    """A copy of the tiny pipeline that the test may change."""
    return copied(tiny_pipe_original)


@pytest.fixture(scope="session")
def tiny_xl_original() -> Any:
    """A tiny SDXL pipeline of the session, with two text encoders: read it, never change it."""
    return MODELS["stable-diffusion-xl"]()


@pytest.fixture
def tiny_xl(tiny_xl_original: Any) -> Any:
    """A copy of it that the test may change."""
    return copied(tiny_xl_original)


@pytest.fixture(scope="session")
def tiny_pipe_folder(tiny_pipe_original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a folder on disk: read it, never change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_pipe_original.save_pretrained(folder)
    return folder


def draw_image(
    pipe: Any, prompt: str | None = "a photo of a cat", *, steps: int = 2, seed: int = 7, **options: Any
) -> Any:
    """One image of a tiny pipeline as a float tensor `(32, 32, 3)`, from the noise of a seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    options = {"height": 32, "width": 32, "output_type": "np", **options}
    if "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
        options.setdefault("max_sequence_length", 32)
    made = pipe(prompt, num_inference_steps=steps, generator=generator, **options).images[0]
    return torch.from_numpy(made)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Any]:
    """Draws one image: `draw(pipe, "a cat")`."""
    return draw_image


@pytest.fixture(scope="session")
def same_picture() -> Callable[[Any, Any], None]:
    """Compares pictures of a pipeline and of what was read back from its files, whose weights are the same bits.

    Files are mapped into memory where they lie, and the products of some CPUs are rounded by where a row begins.
    """
    import torch

    return partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def tensors_of_pipe(pipe: Any) -> dict[str, Any]:
    """A copy of every tensor of a pipeline, by component and name."""
    import torch

    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    # Paths as erasures have them, whichever way a text encoder's class nests its model.
    return {
        f"{name}/{key.removeprefix('text_model.')}": value.clone()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Any], dict[str, Any]]:
    """Copies every tensor of a pipeline."""
    return tensors_of_pipe


@pytest.fixture(scope="session")
def changed_tensors() -> Callable[[dict[str, Any], Any], set[str]]:
    """Names of the tensors of a pipeline that differ from a copy in a bit, or are in one of the two only."""
    import torch

    def compare(before: dict[str, Any], pipe: Any) -> set[str]:
        after = tensors_of_pipe(pipe)
        lost = set(before) ^ set(after)
        return lost | {key for key in set(before) & set(after) if not torch.equal(before[key], after[key])}

    return compare


@pytest.fixture
def make_sae() -> Callable[..., Any]:
    """Makes a sparse autoencoder of random weights, thresholds 0.8."""

    import torch

    from erasure.sae import SAEConfig, SparseAutoencoder

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


@pytest.fixture(scope="session")
def load_tiny_ip_adapter() -> Callable[[Any], dict[str, Any]]:
    """Loads an IP-Adapter with random weights into a tiny pipeline."""
    return add_tiny_ip_adapter


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


@pytest.fixture(scope="session")
def teach() -> Callable[..., None]:
    """Loads a learned token into a pipeline: `teach(pipe, "a", "cat")` gives `<my-pet>` two vectors."""
    return teach_token
