"""SLD against the paper's plain arithmetic, a loop over passes of the stock denoiser, on every family."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

import erasure
from erasure import Concept, ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.errors import ConceptError, IgnoredRetainWarning, OptionError
from erasure.strategies import get

PROMPT, CONCEPT = "a photo of a cat", "cat"
STEPS = 5
MILD = {"scale": 0.7, "threshold": 0.05, "momentum_scale": 0.4, "momentum_decay": 0.6, "warmup_steps": 10}
"""Figures at which every part of the formula counts in a tiny model: shares between 0 and 1, signs of both kinds."""


@pytest.fixture(scope="module")
def originals(tiny_models: Any) -> Callable[[str], Any]:
    """The tiny pipeline of each family, made once: read it, never change it."""
    made: dict[str, Any] = {}

    def original(family: str) -> Any:
        if family not in made:
            made[family] = tiny_models[family]()
            if family.startswith("stable-diffusion") and family != "stable-diffusion-3":
                made[family].scheduler = DDIMScheduler.from_config(made[family].scheduler.config)
        return made[family]

    return original


def guided_latents(pipe: Any, noise: torch.Tensor, **options: Any) -> torch.Tensor:
    """The last latents of the stock pipeline's call, as they are packed."""
    if "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
        options["max_sequence_length"] = 32
    chosen = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent", **options}
    return pipe(latents=noise.clone(), **{"prompt": PROMPT, **chosen}).images


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check that latents agree, to a part of their largest value: what tells batches of other sizes apart."""
    assert found.dtype == wanted.dtype
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-9}[found.dtype]
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def plain_directions(
    own: torch.Tensor, null: torch.Tensor, concept: torch.Tensor, nu: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations 3 to 8 of the paper: what is subtracted, and the momentum of the next step."""
    phi = options["scale"] * (own - concept)
    mu = torch.where(own - concept < options["threshold"], phi.abs().clamp(max=1), torch.zeros(()))
    g = mu * (concept - null) + options["momentum_scale"] * nu
    return g, options["momentum_decay"] * nu + (1 - options["momentum_decay"]) * g


def plain_loop(
    backbone: Backbone, x: torch.Tensor, options: dict[str, Any], weight: float, *, prompts: list[str],
    negative: str | None = None, told: float | None = None, strength: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """The paper's sampling: every prediction by itself, guidance written out.

    Args:
        backbone: Of the stock pipeline.
        x: Initial latents.
        options: Those of the strategy.
        weight: Scale w of guidance.
        prompts: One for each picture.
        negative: The negative prompt.
        told: Guidance that the transformer is told.
        strength: Of the erasure.
    """
    own = backbone.encode(prompts)
    empty = backbone.null(backbone.encode([""]))
    null = (empty if negative is None else backbone.encode([negative])).repeated(len(prompts))
    empty, safe = empty.repeated(len(prompts)), backbone.encode([CONCEPT]).repeated(len(prompts))
    nu, w = torch.zeros_like(x), told or 1.0
    for index, t in enumerate(backbone.timesteps(STEPS)):
        level = t.expand(len(x))
        e_own, e_null, e_safe, e_empty = (
            backbone.predict(backbone.model_input(x, t), level, part, told) for part in (own, null, safe, empty)
        )
        ahead = e_null if backbone.guides_in_one_call and weight > 1 else e_empty
        g, nu = plain_directions(e_own / w, ahead / w, e_safe / w, nu, options)
        acts = index >= options["warmup_steps"] * STEPS // 50
        changed = e_own - strength * w * g * acts
        prediction = e_null + weight * (changed - e_null) if weight > 1 else changed
        x = backbone.step(prediction, t, x)
    return x


def erased(pipe: Any, **options: Any) -> Any:
    twin = copy.deepcopy(pipe)
    erasure.erase(twin, CONCEPT, "sld", progress=False, **options)
    return twin


@pytest.mark.parametrize(
    ("preset", "weight"),
    [("weak", 5.0), ("medium", 5.0), ("strong", 5.0), ("max", 5.0), (None, 5.0), ("max", 1.0), (None, 1.0)],
)
@torch.no_grad()
def test_draws_what_the_papers_arithmetic_draws(originals: Any, preset: str | None, weight: float) -> None:
    # The presets multiply differences, and so what rounding leaves of them, by up to 5000.
    stock = copy.deepcopy(originals("stable-diffusion")).to(torch.float64 if preset else torch.float32)
    method = get("sld").configured(preset, text="{}", **({} if preset else MILD))
    options = {name: getattr(method, name) for name in MILD}
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1), dtype=stock.dtype)
    found = guided_latents(erased(stock, text="{}", **options), noise, guidance_scale=weight)
    wanted = plain_loop(backbone_for(stock), noise, options, weight, prompts=[PROMPT])
    assert (wanted - guided_latents(stock, noise, guidance_scale=weight)).abs().max() > 1e-3
    assert_close(found, wanted)


@torch.no_grad()
def test_negative_prompts_batches_and_several_images_of_a_prompt(originals: Any) -> None:
    stock, prompts = originals("stable-diffusion"), ["a photo of a cat", "a dog"]
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    found = guided_latents(
        erased(stock, **MILD), noise, prompt=prompts, negative_prompt=["a house"] * 2, num_images_per_prompt=2,
        guidance_scale=3.0,
    )  # fmt: skip
    each = [prompts[0], prompts[0], prompts[1], prompts[1]]
    wanted = plain_loop(backbone_for(stock), noise, MILD, 3.0, prompts=each, negative="a house")
    assert_close(found, wanted)


@pytest.mark.parametrize("family", ["stable-diffusion-xl", "stable-diffusion-3", "flux", "chroma"])
@torch.no_grad()
def test_every_family_is_guided_by_the_same_arithmetic(originals: Any, family: str) -> None:
    stock = originals(family)
    backbone = backbone_for(stock, size=(32, 32))
    x = torch.randn(1, *backbone.latents.shape(), generator=torch.Generator().manual_seed(3))
    noise = x if family not in ("flux", "chroma") else _packed(x)
    told = 3.5 if family == "flux" else None
    weight = 1.0 if told else 4.0
    found = guided_latents(erased(stock, **MILD), noise, guidance_scale=told or weight)
    wanted = plain_loop(backbone, x, MILD, weight, prompts=[PROMPT], told=told)
    assert_close(found, wanted if found.ndim == 4 else _packed(wanted))


@torch.no_grad()
def test_a_true_negative_prompt_of_flux_takes_a_pass_that_is_left_alone(originals: Any) -> None:
    stock = originals("flux")
    backbone = backbone_for(stock, size=(32, 32))
    x = torch.randn(1, *backbone.latents.shape(), generator=torch.Generator().manual_seed(3))
    found = guided_latents(
        erased(stock, **MILD), _packed(x), guidance_scale=2.0, true_cfg_scale=3.0, negative_prompt="a house"
    )
    wanted = plain_loop(backbone, x, MILD, 3.0, prompts=[PROMPT], told=2.0, negative="a house")
    assert_close(found, _packed(wanted))


@torch.no_grad()
def test_a_sampler_of_second_order_counts_a_noise_level_once(originals: Any) -> None:
    pipe = copy.deepcopy(originals("stable-diffusion"))
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    twin, backbone = erased(pipe, **MILD), backbone_for(pipe)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    found = guided_latents(twin, noise, guidance_scale=4.0)
    own, null, safe = backbone.encode([PROMPT]), backbone.null(backbone.encode([""])), backbone.encode([CONCEPT])
    levels = [float(t) for t in backbone.timesteps(STEPS)]
    kept: dict[float, torch.Tensor] = {}
    ahead, x = torch.zeros_like(noise), noise * pipe.scheduler.init_noise_sigma
    for index, level in enumerate(levels):
        t = torch.tensor(level)
        if index and level != levels[index - 1]:
            ahead = kept[levels[index - 1]]
        e_own, e_null, e_safe = (
            backbone.predict(backbone.model_input(x, t), t[None], part) for part in (own, null, safe)
        )
        g, kept[level] = plain_directions(e_own, e_null, e_safe, ahead, MILD)
        acts = sorted(set(levels), reverse=True).index(level) >= MILD["warmup_steps"] * STEPS // 50
        x = backbone.step(e_null + 4.0 * (e_own - g * acts - e_null), t, x)
    assert len(levels) > len(kept)
    assert_close(found, x)


@pytest.mark.parametrize("strength", [0.5, 2.0])
@torch.no_grad()
def test_strength_multiplies_what_is_subtracted(originals: Any, strength: float) -> None:
    stock = originals("stable-diffusion")
    twin = erased(stock, **MILD)
    ErasureManager(twin).set_erasures("cat-sld", strength)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    found = guided_latents(twin, noise, guidance_scale=3.0)
    wanted = plain_loop(backbone_for(stock), noise, MILD, 3.0, prompts=[PROMPT], strength=strength)
    assert_close(found, wanted)


def test_several_concepts_are_one_text_with_all_their_names(originals: Any) -> None:
    stock = originals("stable-diffusion")
    concepts = [Concept("cat", synonyms=("kitten",)), Concept("monet", kind="style")]
    made = erasure.erase(stock, concepts, "sld", attach=False, progress=False, text="an image showing {}")
    with torch.no_grad():
        wanted = backbone_for(stock).encode(["an image showing cat, kitten, monet", ""]).tokens
    assert torch.equal(made.edits.safety["unet"].tokens, wanted)


def test_a_retain_list_without_effect_is_said(originals: Any) -> None:
    with pytest.warns(IgnoredRetainWarning, match="keeps nothing on purpose"):
        erasure.erase(originals("stable-diffusion"), Concept("cat", retain="dog"), "sld", attach=False, progress=False)


@pytest.mark.parametrize("text", ["a photo", "{} and {}", "{0}", "{name}", "{{}}"])
def test_a_text_without_one_place_for_the_concept_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="where the concept's names go"):
        get("sld").configured(text=text)


@pytest.mark.parametrize("option", [{"warmup_steps": 50}, {"scale": 0.0}, {"momentum_decay": 1.1}])
def test_options_out_of_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        get("sld").configured(**option)


def test_a_name_without_a_token_is_refused(originals: Any) -> None:
    with pytest.raises(ConceptError):
        erasure.erase(
            originals("stable-diffusion"), Concept("cat", synonyms=("猫",)), "sld", attach=False, progress=False
        )


def _packed(x: torch.Tensor) -> torch.Tensor:
    batch, channels, rows, columns = x.shape
    patches = x.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows // 2 * (columns // 2), channels * 4)
