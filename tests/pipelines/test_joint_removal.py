"""Object removal and finding with SD3 and Flux: against the stock loops, in plain arithmetic, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxInpaintPipeline,
    FluxTransformer2DModel,
    StableDiffusion3InpaintPipeline,
)
from PIL import Image
from torch import Tensor

from erasure.backbones import backbone_for
from erasure.errors import ExperimentalWarning, UnsupportedModelError
from erasure.pipelines import FluxObjectRemovalPipeline, StableDiffusion3ObjectRemovalPipeline, drop_in, localization
from erasure.pipelines.localization import name_weights

STOCK = {"flux": FluxInpaintPipeline, "stable-diffusion-3": StableDiffusion3InpaintPipeline}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
MASK = np.zeros((32, 32), dtype=bool)
MASK[8:16, 8:16] = True

pytestmark = pytest.mark.filterwarnings("ignore::erasure.errors.ExperimentalWarning")


def widened(pipe: Any) -> Any:
    """A pipeline with latents of 16 values, which is what the stock inpainting loops know."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(pipe.vae.config, latent_channels=16)
    kind = type(pipe.transformer)
    channels = {"in_channels": 64} if kind is FluxTransformer2DModel else {"in_channels": 16, "out_channels": 16}
    transformer = kind.from_config(pipe.transformer.config, **channels)
    for part in (vae, transformer):
        part.eval().requires_grad_(False)
    parts = {**pipe.components, "vae": vae, "transformer": transformer}
    return type(pipe)(**{name: part for name, part in parts.items() if part is not None})


@pytest.fixture(scope="module")
def originals(tiny_models: Any) -> dict[str, Any]:
    """Tiny pipelines of both families with latents of 16 values: read them, never change them."""
    return {name: widened(tiny_models[name]()) for name in STOCK}


@pytest.fixture(params=list(STOCK))
def pipe(request: pytest.FixtureRequest, originals: dict[str, Any]) -> Any:
    made = drop_in(originals[request.param], "object-removal").from_pipe(originals[request.param])
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: Any, **options: Any) -> Tensor:
    settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt",
                "max_sequence_length": 8}  # fmt: skip
    return pipe(IMAGE, MASK, **settings | options).images


def test_without_redirection_it_is_the_stock_inpainting_pipeline(pipe: Any) -> None:
    kind = next(stock for stock in STOCK.values() if isinstance(pipe, stock))
    stock = kind.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    latents = pipe.encode_images(pipe.read_images(IMAGE))
    mask = torch.from_numpy(MASK)[None, None].float()
    wanted = stock(
        "a cat", image=latents, mask_image=mask, masked_image_latents=torch.zeros_like(latents), height=32, width=32,
        num_inference_steps=3, strength=0.8, guidance_scale=1.0, max_sequence_length=8, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    backbone = backbone_for(pipe)
    plain = {"redirect": False, "blend_radius": 0.0, "mask_blur": 0, "prompt": "a cat"}
    made = run(pipe, **plain)
    assert (made - backbone.decode(backbone.latents.unpacked(wanted, 32, 32))).abs().max() < 1e-5
    assert (run(pipe, **plain | {"redirect": True}) - made).abs().max() > 1e-4


def test_surroundings_are_put_back_with_the_noise_of_the_step(pipe: Any) -> None:
    """`(1 - s) x + s noise` outside of the mask, at the level that the next step begins with."""
    seen: list[Tensor] = []

    def watch(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    run(pipe, strength=1.0, mask_blur=0, callback_on_step_end=watch)
    backbone = backbone_for(pipe, size=(32, 32))
    clean = pipe.encode_images(pipe.read_images(IMAGE))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    outside = ~torch.from_numpy(MASK[::2, ::2])
    levels = [*(backbone.timesteps(3)[1:] / 1000), torch.tensor(0.0)]
    for level, latents in zip(levels, seen, strict=True):
        wanted = (1 - level) * clean + level * noise
        found = backbone.latents.unpacked(latents, 32, 32)
        assert (found - wanted)[..., outside].abs().max() < 1e-5


def test_guidance_is_taken_between_the_branches(pipe: Any) -> None:
    """After one step latents are linear in the scale; with the redirected branch alone they are those of scale 1."""
    step = {"num_inference_steps": 1, "strength": 1.0}
    seen: dict[float, Tensor] = {}
    for scale in (1.0, 2.0, 3.0):
        keep = lambda _, __, ___, tensors, scale=scale: seen.update({scale: tensors["latents"]}) or tensors  # noqa: E731
        run(pipe, removal_guidance_scale=scale, callback_on_step_end=keep, **step)
    assert (seen[1.0] + seen[3.0] - 2 * seen[2.0]).abs().max() < 1e-4
    assert (seen[1.0] - seen[3.0]).abs().max() > 1e-4


def test_latents_of_other_than_sixteen_values(tiny_models: Any) -> None:
    """The loop of Flux takes them once the mask is packed for it; that of SD3 blends transformers of 16 only."""
    flux = FluxObjectRemovalPipeline.from_pipe(tiny_models["flux"]())
    flux.set_progress_bar_config(disable=True)
    assert flux.vae.config.latent_channels == 4
    made = run(flux)
    assert made.shape == (1, 3, 32, 32)
    assert torch.isfinite(made).all()
    sd3 = StableDiffusion3ObjectRemovalPipeline.from_pipe(tiny_models["stable-diffusion-3"]())
    with pytest.raises(UnsupportedModelError, match=r"takes 4 channels, .*of 16 channels"):
        run(sd3)


def test_what_a_transformer_cannot_do_is_refused(pipe: Any) -> None:
    for options, said in (
        ({"sampler": "inversion"}, "FlowMatchEulerDiscreteScheduler"), ({"preset": "official-sd15"}, "DDIM's noise"),
        ({"free_u": (0.9, 0.2, 1.4, 1.6)}, "FreeU scales the decoder of a UNet"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match=said):
            run(pipe, **options)


def test_a_negative_prompt_without_a_second_pass_is_said(pipe: Any) -> None:
    with pytest.warns(UserWarning, match=f"negative_prompt= does nothing at {pipe.guided_by}=1"):
        run(pipe, negative_prompt="a dog", num_inference_steps=2)


def test_a_batch_with_masks_of_its_own_equals_its_parts(pipe: Any) -> None:
    other = np.zeros((32, 32), dtype=bool)
    other[16:26, 18:28] = True
    seeds = lambda *which: [torch.Generator().manual_seed(seed) for seed in which]  # noqa: E731
    settings = {"num_inference_steps": 2, "output_type": "pt", "max_sequence_length": 8}
    both = pipe([IMAGE, IMAGE.rotate(90)], [MASK, other], generator=seeds(0, 1), **settings).images
    alone = [
        pipe(image, mask, generator=seeds(seed), **settings).images
        for seed, (image, mask) in enumerate([(IMAGE, MASK), (IMAGE.rotate(90), other)])
    ]
    assert (both - torch.cat(alone)).abs().max() < 1e-4


def test_that_it_is_an_experiment_is_said_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localization, "_SAID", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(pipe, num_inference_steps=2)
            pipe.localize(IMAGE, "cat", num_inference_steps=4)
    said = [str(one.message) for one in caught if issubclass(one.category, ExperimentalWarning)]
    assert [text.split(" with ")[0] for text in said] == ["object removal", "finding things"]


# Finding ------------------------------------------------------------------------------------------------------------


def test_nouns_are_found_in_every_text_encoder(tiny_models: Any) -> None:
    """T5 has no start token; SD3's T5 stands behind its CLIPs."""
    flux, sd3 = (backbone_for(tiny_models[name](), length=16) for name in STOCK)
    prompt, weights = name_weights(flux, ["cat", "the dog"])
    assert prompt == "a cat and the dog"
    assert weights[0, :, 1].nonzero()[:, 0].tolist() == [1]
    assert weights[0, :, 2].nonzero()[:, 0].tolist() == [4]
    prompt, weights = name_weights(sd3, ["cat", "the dog"])
    clip = sd3.token_runs[0].tokens
    assert weights.shape == (1, clip + 16, 3)
    assert weights[0, :, 1].nonzero()[:, 0].tolist() == [2, clip + 1]
    assert weights[0, :, 2].nonzero()[:, 0].tolist() == [5, clip + 4]


@pytest.mark.parametrize("family", list(STOCK))
def test_maps_are_shares_of_the_attention_to_text_in_materialised_matrices(family: str, tiny_models: Any) -> None:
    """What each image token pays to a noun, over what it pays to all of the text, mean over blocks and levels."""
    from erasure.pipelines.localization import LocalizationSettings

    pipe = drop_in(tiny_models[family](), "text-to-image").from_pipe(tiny_models[family]())
    settings = LocalizationSettings(power=0, num_inference_steps=4, strength=0.5)
    backbone = backbone_for(pipe, size=(32, 32), length=16)
    latents = pipe.encode_images(pipe.read_images(IMAGE))
    matrices: list[Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention
    tokens, text = 64, backbone.encode(["a cat"]).tokens.shape[1]

    def watch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if key.shape[2] == tokens + text:
            matrices.append((query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1).mean(1)[0])
        return original(query, key, value, *args, **kwargs)

    seed = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    found = pipe._read_maps(backbone, latents, ["cat"], settings, seed())
    _, weights = name_weights(backbone, ["cat"])
    levels = backbone.timesteps(4)[-2:] / 1000
    noise = torch.randn(latents.shape, generator=seed())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        for level in levels:
            backbone.predict((1 - level) * latents + level * noise, level * 1000, backbone.encode(["a cat"]))
    # One double block of Flux ahead of its single one, both blocks of SD3.
    matrices = matrices[::2] if family == "flux" else matrices
    first = family == "flux"
    rows, words = (slice(text, None), slice(text)) if first else (slice(tokens), slice(tokens, None))
    shares = []
    for level in range(2):
        own = torch.stack(matrices[level * len(matrices) // 2 : (level + 1) * len(matrices) // 2])[:, rows, words]
        shares.append((own @ weights[0, :, 1]).mean(0) / own.sum(-1).mean(0))
    wanted = torch.stack(shares).mean(0).view(8, 8)
    assert (found[0, 1] - wanted).abs().max() < 1e-5
    assert (found[0, 0] + wanted).abs().max() < 1e-5


def test_prompts_have_the_length_that_the_model_declares(tiny_models: Any) -> None:
    """32 tokens, where T5 pads to 512 by itself: for finding, and for the stock loop."""
    pipe = FluxObjectRemovalPipeline.from_pipe(tiny_models["flux"]())
    pipe.set_progress_bar_config(disable=True)
    lengths: list[int] = []
    pipe.transformer.context_embedder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    pipe.localize(IMAGE, "cat", num_inference_steps=4)
    assert set(lengths) == {32}
    lengths.clear()
    pipe(IMAGE, MASK, num_inference_steps=2)
    assert set(lengths) == {32}
    pipe(IMAGE, MASK, num_inference_steps=2, max_sequence_length=16)
    assert lengths[-1] == 16


def test_a_model_that_masks_its_text_is_refused(tiny_models: Any) -> None:
    pipe = drop_in(tiny_models["chroma"](), "text-to-image").from_pipe(tiny_models["chroma"]())
    with pytest.raises(UnsupportedModelError, match="given an attention mask, whose attention is not read"):
        pipe.localize(IMAGE, "cat", num_inference_steps=4)


@pytest.mark.parametrize("task", ["object-removal", "composition"])
def test_tasks_without_a_drop_in_are_refused_by_name(task: Any, tiny_models: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"no drop-in for ChromaPipeline that does {task}"):
        drop_in(copy.copy(tiny_models["chroma"]()), task)
