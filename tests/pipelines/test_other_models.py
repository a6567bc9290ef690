"""Models and packages beside the plain ones: inpainting and consistency UNets, schedulers, DeepCache, tomesd."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

import erasure
from erasure.attach import ErasureManager
from erasure.backbones import StableDiffusionBackbone
from erasure.errors import BypassedErasureWarning, MaskError, OptionError, UnsupportedModelError
from erasure.eval.samples import drawing
from erasure.interop.patches import has_deep_cache
from erasure.pipelines import (
    StableDiffusionAStarPipeline,
    StableDiffusionErasurePipeline,
    StableDiffusionObjectRemovalPipeline,
)

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
MASK = np.zeros((32, 32), dtype=bool)
MASK[8:16, 8:16] = True


def remove(base: Any, **options: Any) -> Tensor:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(IMAGE, MASK, **settings | options).images


def compose(base: Any, **options: Any) -> Any:
    pipe = StableDiffusionAStarPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe("a cat and a dog", subjects=["cat", "dog"], height=32, width=32, **settings | options).images


def find(base: Any) -> Any:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe.localize(IMAGE, "cat", num_inference_steps=4)


# UNets --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def inpainting(tiny_pipe: Any) -> Any:
    """A UNet of nine channels that knows the plain one's weights."""
    plain = tiny_pipe.unet
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(plain.config, in_channels=9).eval().requires_grad_(False)
    weights = {name: value for name, value in plain.state_dict().items() if name != "conv_in.weight"}
    unet.load_state_dict(weights, strict=False)
    tiny_pipe.unet = unet
    return tiny_pipe


def test_an_inpainting_unet_takes_erasures_and_paints(inpainting: Any) -> None:
    erasure.erase(inpainting, "cat", "uce", vocabulary=8, progress=False)
    assert ErasureManager(inpainting).verify() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BypassedErasureWarning)
        assert torch.isfinite(remove(inpainting)).all()
        assert find(inpainting).masks.shape == (1, 1, 32, 32)


def test_an_inpainting_unet_predicts_from_text_as_one_that_is_masked_all_over(inpainting: Any) -> None:
    backbone = StableDiffusionBackbone(inpainting)
    x, t = backbone.noise([0, 1]), torch.tensor([500, 200])
    assert x.shape == (2, 4, 16, 16)
    text = backbone.encode(["a cat", "a dog"])
    vae = inpainting.vae
    grey = vae.config.scaling_factor * vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
    told = torch.cat([x, torch.ones(2, 1, 16, 16), grey.expand(2, -1, -1, -1)], 1)
    wanted = inpainting.unet(told, t, text.tokens).sample
    assert torch.equal(backbone.predict(x, t, text), wanted)


def test_an_inpainting_unet_does_not_draw_from_a_prompt_alone(inpainting: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="9 channels: it paints into pictures"):
        compose(inpainting)
    with pytest.raises(UnsupportedModelError, match="9 channels: it paints into pictures"):
        drawing(inpainting)


def test_an_inpainting_unet_is_inverted_under_the_mask_that_it_samples_with(inpainting: Any) -> None:
    told: list[Tensor] = []
    inpainting.unet.register_forward_pre_hook(lambda _, args: told.append(args[0][0, 4].clone()))
    remove(inpainting, sampler="inversion", strength=1.0, mask_blur=0, shared_trunk=True)
    assert len(told) == 10
    assert all(torch.equal(mask, told[0]) for mask in told)
    assert 0 < told[0].mean() < 1


@pytest.fixture
def consistent(tiny_pipe: Any) -> Any:
    """A latent consistency UNet, which is told its guidance scale, with its sampler."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(tiny_pipe.unet.config, time_cond_proj_dim=8)
    tiny_pipe.unet = unet.eval().requires_grad_(False)
    tiny_pipe.scheduler = LCMScheduler.from_config(tiny_pipe.scheduler.config)
    return tiny_pipe


def test_a_latent_consistency_unet_is_told_its_guidance_everywhere(consistent: Any) -> None:
    told: list[Any] = []
    consistent.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs.get("timestep_cond")), with_kwargs=True
    )
    for call in (remove, compose, find, lambda base: erasure.erase(base, "cat", "uce", vocabulary=8, progress=False)):
        told.clear()
        call(consistent)
        assert told
        assert all(value is not None and value.shape[1] == 8 for value in told)
    assert ErasureManager(consistent).verify() > 0


def test_ddim_on_a_latent_consistency_unet_is_refused(consistent: Any) -> None:
    for options in ({"sampler": "inversion"}, {"preset": "official-sdxl"}):
        with pytest.raises(UnsupportedModelError, match="latent consistency UNet"):
            remove(consistent, **options)
    with pytest.raises(UnsupportedModelError, match="latent consistency UNet"):
        erasure.erase(consistent, "cat", "esd", steps=1, attach=False, progress=False)


def test_one_step_is_enough_for_a_turbo_model(tiny_pipe: Any) -> None:
    tiny_pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        tiny_pipe.scheduler.config, timestep_spacing="trailing"
    )
    assert torch.isfinite(remove(tiny_pipe, num_inference_steps=1, strength=1.0)).all()
    with pytest.raises(OptionError, match="a model of one step needs strength=1"):
        remove(tiny_pipe, num_inference_steps=1)


# Schedulers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda own: DDIMScheduler.from_config(own, clip_sample=True),
        lambda own: DDIMScheduler.from_config(own, thresholding=True),
        lambda own: PNDMScheduler.from_config(own, skip_prk_steps=True),
        lambda own: EulerAncestralDiscreteScheduler.from_config(own),
    ],
    ids=["clips", "thresholds", "pndm", "ancestral"],
)
def test_inversion_is_that_of_plain_ddim_whatever_the_scheduler(tiny_pipe: Any, scheduler: Any) -> None:
    wanted = remove(tiny_pipe, sampler="inversion")
    own = tiny_pipe.scheduler.config
    tiny_pipe.scheduler = scheduler(own)
    mine = tiny_pipe.scheduler
    found = remove(tiny_pipe, sampler="inversion")
    assert (found - wanted).abs().max() < 1e-5
    assert tiny_pipe.scheduler is mine


def test_schedulers_that_ddim_knows_nothing_of_are_refused(tiny_pipe: Any) -> None:
    tiny_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    for options in ({"sampler": "inversion"}, {"released_scheduler": True}):
        with pytest.raises(UnsupportedModelError, match="FlowMatchEulerDiscreteScheduler"):
            remove(tiny_pipe, **options)


# Packages -----------------------------------------------------------------------------------------------------------


class DeepCache:
    """What DeepCache 0.1.1 does to a pipeline: closures over the forwards, and the step looked up by its level."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.before = pipe, pipe.unet.forward

    def enable(self) -> None:
        """Replace the forward."""

        def wrapped_forward(*args: Any, **kwargs: Any) -> Any:
            list(self.pipe.scheduler.timesteps).index(args[1].item())
            return self.before(*args, **kwargs)

        wrapped_forward.__module__ = "DeepCache.extension.deepcache"
        self.before = self.pipe.unet.forward
        self.pipe.unet.forward = wrapped_forward

    def disable(self) -> None:
        """Put back what was there."""
        self.pipe.unet.forward = self.before


def test_under_deep_cache_what_cannot_work_is_refused(tiny_pipe: Any, draw: Any) -> None:
    cache = DeepCache(tiny_pipe)
    cache.enable()
    assert has_deep_cache(tiny_pipe.unet)
    calls = (
        remove, compose, find,
        lambda base: erasure.erase(base, "cat", "uce", vocabulary=8, progress=False),
        lambda base: erasure.erase(base, "cat", "esd", steps=1, attach=False, progress=False),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UnsupportedModelError, match="DeepCache is enabled"):
            call(tiny_pipe)
    cache.disable()
    assert not has_deep_cache(tiny_pipe.unet)


def test_erasures_stay_in_force_and_come_off_around_deep_cache(tiny_pipe: Any, draw: Any) -> None:
    stock, cache = draw(tiny_pipe), DeepCache(tiny_pipe)
    erasure.erase(tiny_pipe, "cat", "uce", vocabulary=8, progress=False)
    manager, erased = ErasureManager(tiny_pipe), draw(tiny_pipe)
    cache.enable()
    assert torch.equal(draw(tiny_pipe), erased)
    assert manager.verify() > 0
    for change in (manager.unload, manager.disable, manager.twin):
        with pytest.raises(UnsupportedModelError, match="DeepCache is enabled"):
            change()
    cache.disable()
    assert torch.equal(draw(tiny_pipe), erased)
    manager.unload()
    assert torch.equal(draw(tiny_pipe), stock)


def test_under_tomesd_what_needs_the_places_of_tokens_is_refused(tiny_pipe: Any) -> None:
    arguments = {"merge_attn": True, "merge_crossattn": False}
    tiny_pipe.unet._tome_info = {"size": None, "hooks": [], "args": arguments}
    for call in (remove, find):
        with pytest.raises(UnsupportedModelError, match="tomesd merges tokens ahead of self-attention"):
            call(tiny_pipe)
    assert torch.isfinite(compose(tiny_pipe)).all()
    arguments["merge_crossattn"] = True
    with pytest.raises(UnsupportedModelError, match="tomesd merges tokens ahead of cross-attention"):
        compose(tiny_pipe)


def test_what_is_found_by_no_name_is_refused(tiny_pipe: Any) -> None:
    pipe = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    with pytest.raises(MaskError, match="names nothing"):
        pipe.localize(IMAGE, " ")
    assert issubclass(StableDiffusionErasurePipeline, StableDiffusionPipeline)
