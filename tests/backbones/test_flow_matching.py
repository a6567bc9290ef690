"""SD3, Flux and Chroma through their backbones against the stock pipelines: what they draw, and what they are told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from erasure.backbones import Backbone, Conditioning, backbone_for
from erasure.backbones.parametrisation import Flow
from erasure.errors import OptionError, UnsupportedModelError

PROMPT = "a photo of a cat"


def without_t5(pipe: Any) -> Any:
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipe


def at_levels(pipe: Any, **options: Any) -> Any:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**options)
    return pipe


KINDS: dict[str, Callable[[Any], Any]] = {
    "flux dev": lambda make: make["flux"](),
    "flux undistilled": lambda make: make["flux"](guidance_embeds=False),
    "flux schnell": lambda make: at_levels(make["flux"](guidance_embeds=False), shift=1.0),
    "sd3": lambda make: make["stable-diffusion-3"](),
    "sd3 without t5": lambda make: without_t5(make["stable-diffusion-3"]()),
    "sd3 dynamic": lambda make: at_levels(make["stable-diffusion-3"](), use_dynamic_shifting=True),
    "chroma": lambda make: make["chroma"](),
}


@pytest.fixture(scope="module")
def originals(tiny_models: Any) -> dict[str, Any]:
    return {name: make(tiny_models) for name, make in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request: Any) -> str:
    return request.param


@pytest.fixture
def pipe(originals: dict[str, Any], kind: str) -> Any:
    return copy.copy(originals[kind])


@pytest.fixture
def backbone(pipe: Any) -> Backbone:
    return backbone_for(pipe)


def sampled(backbone: Backbone, guidance: float, steps: int, seed: int) -> torch.Tensor:
    """Latents of the backbone's own sampling loop."""
    own, null = backbone.encode([PROMPT]), backbone.null(backbone.encode([""]))
    levels, latents = backbone.timesteps(steps), backbone.noise([seed])
    for t in levels:
        prediction = backbone.predict(latents, t, own, guidance)
        if guidance > 1 and not backbone.takes_guidance:
            prediction = backbone.guided(prediction, backbone.predict(latents, t, null), guidance)
        latents = backbone.step(prediction, t, latents)
    return latents


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_the_sampling_loop_is_the_pipelines(pipe: Any, guidance: float, size: tuple[int, int]) -> None:
    """Guided and not, by a second pass or by being told, at the model's own size and at another."""
    backbone = backbone_for(pipe, size=size)
    options = backbone.call_options(guidance, 3)
    assert options["max_sequence_length"] == 32
    noise = torch.Generator().manual_seed(11)
    stock = backbone.latents.unpacked(pipe(PROMPT, output_type="latent", generator=noise, **options).images)
    assert stock.shape[2:] == (size[0] // 2, size[1] // 2)
    found = sampled(backbone, guidance, 3, 11)
    assert (found - stock).abs().max() <= 1e-5 * stock.abs().max()


@torch.no_grad()
def test_guidance_makes_a_difference(backbone: Backbone) -> None:
    assert not torch.allclose(sampled(backbone, 1.0, 2, 3), sampled(backbone, 3.5, 2, 3), rtol=1e-4)


@torch.no_grad()
def test_steps_keep_nothing_between_them(pipe: Any) -> None:
    """Two runs whose steps take turns, on one scheduler: its own `step` would count them as one."""
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    backbone = backbone_for(pipe)
    own = backbone.encode([PROMPT])
    levels = backbone.timesteps(3)
    alone = [backbone.noise([seed]) for seed in (0, 1)]
    for row in range(2):
        for t in levels:
            alone[row] = backbone.step(backbone.predict(alone[row], t, own), t, alone[row])
    turns = [backbone.noise([seed]) for seed in (0, 1)]
    for t in levels:
        turns = [backbone.step(backbone.predict(x, t, own), t, x) for x in turns]
    assert all(torch.equal(a, b) for a, b in zip(alone, turns, strict=True))
    assert pipe.scheduler.step_index is None


@torch.no_grad()
def test_whole_levels_and_batches_are_taken(backbone: Backbone) -> None:
    """Levels may be whole numbers, one for the batch or one a row; a row of a batch is what it is alone."""
    own = backbone.encode([PROMPT, "a dog"])
    x = backbone.noise([0, 1])
    both = backbone.predict(x, torch.tensor([500, 250]), own)
    for row, t in enumerate((500, 250)):
        alone = backbone.predict(x[row : row + 1], torch.tensor(t), own.rows(slice(row, row + 1)))
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_it_differentiates(backbone: Backbone) -> None:
    own, x = backbone.encode([PROMPT]), backbone.noise([0])
    tokens = own.tokens.clone().requires_grad_()
    told = Conditioning(tokens, own.pooled, own.mask)
    backbone.predict(x, torch.tensor(500.0), told).square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().max() > 0


@torch.no_grad()
def test_text_enters_through_the_layers_that_are_named(pipe: Any, kind: str) -> None:
    """Without them the prompt makes no difference."""
    pipe.transformer = copy.deepcopy(pipe.transformer)
    backbone = backbone_for(pipe)
    layers = backbone.entry_layers()
    tokens = "transformer/context_embedder"
    pooled = [] if kind == "chroma" else ["transformer/time_text_embed.text_embedder.linear_1"]
    assert [layer.key for layer in layers] == [tokens, *pooled]
    assert [layer.source for layer in layers] == ["tokens", "pooled"][: len(layers)]
    x, t = backbone.noise([0]), torch.tensor(500.0)
    cat, dog = backbone.encode(["a cat"]), backbone.encode(["a dog"])
    assert not torch.equal(backbone.predict(x, t, cat), backbone.predict(x, t, dog))
    for layer in layers:
        assert layer.module.bias is not None
        layer.module.weight.zero_()
    assert torch.equal(backbone.predict(x, t, cat), backbone.predict(x, t, dog))


@torch.no_grad()
def test_every_part_of_what_is_told_matters(backbone: Backbone) -> None:
    """Swap tests: the part of one text encoder, or the pooled vector, of another prompt."""
    x, t = backbone.noise([0]), torch.tensor(500.0)
    cat, dog = backbone.encode(["a cat"]), backbone.encode(["a dog"])
    stock = backbone.predict(x, t, cat)
    swapped = [] if cat.pooled is None else [Conditioning(cat.tokens, dog.pooled, cat.mask)]
    for part in backbone.written():
        tokens = cat.tokens.clone()
        tokens[:, part.places, part.columns] = dog.tokens[:, part.places, part.columns]
        assert not torch.equal(tokens, cat.tokens)
        swapped.append(Conditioning(tokens, cat.pooled, cat.mask))
    assert all((backbone.predict(x, t, told) - stock).abs().max() > 1e-6 for told in swapped)


def test_who_wrote_which_tokens(originals: dict[str, Any]) -> None:
    def parts(kind: str) -> list[tuple[str, slice, slice]]:
        return [tuple(part) for part in backbone_for(originals[kind]).written()]  # type: ignore[misc]

    clips = [("text_encoder", slice(0, 77), slice(0, 32)), ("text_encoder_2", slice(0, 77), slice(32, 64))]
    assert parts("sd3") == [*clips, ("text_encoder_3", slice(77, None), slice(0, 80))]
    assert parts("sd3 without t5") == clips
    assert parts("flux dev") == [("text_encoder_2", slice(0, None), slice(0, 32))]
    assert parts("chroma") == [("text_encoder", slice(0, None), slice(0, 32))]
    assert {kind: backbone_for(pipe).reader.component for kind, pipe in originals.items() if " " not in kind} == {
        "sd3": "text_encoder", "chroma": "text_encoder",
    }  # fmt: skip
    assert backbone_for(originals["flux dev"]).reader.component == "text_encoder_2"


@torch.no_grad()
def test_decode_is_the_pipelines(pipe: Any, backbone: Backbone) -> None:
    latents = backbone.noise([0])
    config = pipe.vae.config
    stock = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    torch.testing.assert_close(backbone.decode(latents), (stock / 2 + 0.5).clamp(0, 1))
    assert config.shift_factor == 0.1


def test_rollouts_are_deterministic_whatever_the_users_sampler(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, stochastic_sampling=True, use_karras_sigmas=True
    )
    made = backbone_for(pipe).rollout_scheduler()
    assert made is not pipe.scheduler
    assert not made.config.stochastic_sampling
    assert not made.config.use_karras_sigmas
    assert made.config.shift == pipe.scheduler.config.shift
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    assert isinstance(backbone_for(pipe).parametrisation, Flow)
    assert backbone_for(pipe).rollout_scheduler().config.shift == 2.0
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UnsupportedModelError, match="does not sample with"):
        _ = backbone_for(pipe).parametrisation


def test_sizes_that_do_not_divide_are_refused(backbone: Backbone) -> None:
    """Flux' pipeline would draw another size with a line in its log."""
    for size in ((34, 32), (32, 30)):
        with pytest.raises(OptionError, match="multiples of 4"):
            backbone.call_options(size=size)
        with pytest.raises(OptionError, match="multiples of 4"):
            backbone.noise([0], *size)


def test_guidance_of_the_call(originals: dict[str, Any]) -> None:
    def options(kind: str, guidance: float, *negative: str) -> dict[str, Any]:
        made = backbone_for(originals[kind]).call_options(guidance, negative=negative or ("", ""))
        return {name: made[name] for name in made if name not in ("height", "width", "max_sequence_length")}

    assert options("flux dev", 3.5) == {"guidance_scale": 3.5}
    assert options("flux schnell", 1.0) == {}
    assert options("flux undistilled", 3.5) == {"true_cfg_scale": 3.5, "negative_prompt": ["", ""]}
    assert options("flux undistilled", 3.5, "fog", "") == {"true_cfg_scale": 3.5, "negative_prompt": ["fog", ""]}
    assert options("sd3", 3.5) == options("chroma", 3.5) == {"guidance_scale": 3.5}
    assert options("sd3", 3.5, "fog", "") == {"guidance_scale": 3.5, "negative_prompt": ["fog", ""]}
    with pytest.raises(OptionError, match="reads no negative prompt, found 'fog'"):
        options("flux dev", 3.5, "", "fog")


def test_missing_text_encoders_are_named(tiny_models: Any) -> None:
    flux, sd3 = tiny_models["flux"](), tiny_models["stable-diffusion-3"]()
    flux.register_modules(text_encoder_2=None, tokenizer_2=None)
    with pytest.raises(UnsupportedModelError, match="has no text_encoder_2"):
        backbone_for(flux)
    sd3.register_modules(text_encoder=None)
    with pytest.raises(UnsupportedModelError, match="has no text_encoder,"):
        backbone_for(sd3)


def test_a_transformer_that_paints_into_pictures_is_refused(tiny_models: Any) -> None:
    pipe = tiny_models["flux"]()
    pipe.transformer.register_to_config(in_channels=96)
    with pytest.raises(UnsupportedModelError, match="takes 96 channels and the latents have 16"):
        backbone_for(pipe)
