"""SDXL through its backbone against the stock pipeline: what it draws, what it is told, and where text enters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

from erasure.backbones import Backbone, backbone_for
from erasure.errors import UnsupportedModelError

PROMPT = "a photo of a cat"


@pytest.fixture
def pipe(tiny_xl: Any) -> Any:
    return tiny_xl


@pytest.fixture
def backbone(pipe: Any) -> Backbone:
    return backbone_for(pipe)


def test_the_family(pipe: Any, backbone: Backbone) -> None:
    assert backbone.family == "stable-diffusion-xl"
    assert [tower.component for tower in backbone.towers] == ["text_encoder", "text_encoder_2"]
    assert backbone.reader.component == "text_encoder"
    assert [(part.component, part.columns) for part in backbone.written()] == [
        ("text_encoder", slice(0, 32)), ("text_encoder_2", slice(32, 64)),
    ]  # fmt: skip
    assert not any(backbone.lacks(need) for need in ("entry layers", "word states", "trajectories"))


def test_a_refiner_is_refused(pipe: Any) -> None:
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(UnsupportedModelError, match="no supported family"):
        backbone_for(pipe)


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_it_is_told_what_the_pipeline_tells(pipe: Any, zeros: bool) -> None:
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    backbone = backbone_for(pipe)
    tokens, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, device="cpu")
    told = backbone.encode([PROMPT])
    null = backbone.null(backbone.encode([""]))
    assert told.pooled is not None
    assert null.pooled is not None
    for found, wanted in zip(
        (told.tokens, told.pooled, null.tokens, null.pooled), (tokens, pooled, negative, negative_pooled), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert (null.tokens.abs().max() == 0) == zeros


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_the_sampling_loop_is_the_pipelines(
    pipe: Any, scheduler: Any, guidance: float, zeros: bool, size: tuple[int, int]
) -> None:
    """Guided and not, with zeros in the place of the empty prompt and without, and at another size."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    backbone = backbone_for(pipe, size=size)
    stock = pipe(
        PROMPT, output_type="latent", generator=torch.Generator().manual_seed(11),
        **backbone.call_options(guidance, 3),
    ).images  # fmt: skip
    own, null = backbone.encode([PROMPT]), backbone.null(backbone.encode([""]))
    levels = backbone.timesteps(3)
    latents = backbone.noise([11])
    assert latents.shape[2:] == (size[0] // 2, size[1] // 2)
    for t in levels:
        given = backbone.model_input(latents, t)
        prediction = backbone.predict(given, t, own)
        if guidance > 1:
            prediction = backbone.guided(prediction, backbone.predict(given, t, null), guidance)
        latents = backbone.step(prediction, t, latents)
    assert (latents - stock).abs().max() <= 1e-5 * stock.abs().max()


@torch.no_grad()
def test_pooled_vectors_and_tokens_of_both_encoders_matter(backbone: Backbone) -> None:
    """Swap tests: one part of the conditioning of one prompt with the rest of another's."""
    x, t = backbone.noise([0]), torch.tensor([500])
    cat, dog = backbone.encode(["a cat"]), backbone.encode(["a dog"])
    stock = backbone.predict(x, t, cat)
    swapped = [type(cat)(cat.tokens, dog.pooled)]
    for part in backbone.written():
        tokens = cat.tokens.clone()
        tokens[:, part.places, part.columns] = dog.tokens[:, part.places, part.columns]
        swapped.append(type(cat)(tokens, cat.pooled))
    assert len(swapped) == 3
    assert all((backbone.predict(x, t, told) - stock).abs().max() > 1e-6 for told in swapped)


@torch.no_grad()
def test_text_enters_through_the_layers_that_are_named(pipe: Any, backbone: Backbone) -> None:
    """Without them the prompt makes no difference, and the pooled vector fills just the columns that are named."""
    layers = backbone.entry_layers()
    assert [layer.key for layer in layers if layer.source == "pooled"] == ["unet/add_embedding.linear_1"]
    (pooled,) = (layer for layer in layers if layer.source == "pooled")
    assert pooled.columns == slice(32)
    x, t = backbone.noise([0]), torch.tensor([500])
    cat, dog = backbone.encode(["a cat"]), backbone.encode(["a dog"])
    sizes = pooled.module.weight[:, 32:].clone()
    for layer in layers:
        layer.module.weight[:, layer.columns] = 0
    assert torch.equal(backbone.predict(x, t, cat), backbone.predict(x, t, dog))
    assert torch.equal(pooled.module.weight[:, 32:], sizes)
    assert all(isinstance(layer.module, nn.Linear) for layer in layers)


@torch.no_grad()
def test_decode_is_the_pipelines(pipe: Any, backbone: Backbone) -> None:
    latents = backbone.noise([0])
    stock = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(backbone.decode(latents), (stock / 2 + 0.5).clamp(0, 1))
    pipe.to(torch.float16)
    assert torch.isfinite(backbone_for(pipe).decode(latents.half())).all()
    assert pipe.vae.dtype == torch.float16


def test_a_vae_with_means_of_channels_is_refused(pipe: Any, backbone: Backbone) -> None:
    pipe.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.0] * 4)
    with pytest.raises(UnsupportedModelError, match="latents_mean"):
        _ = backbone.latents
