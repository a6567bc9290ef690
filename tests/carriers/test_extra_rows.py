"""Safety guidance in calls of every kind: which rows are prompts', when a drawing begins, what is refused."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FasterCacheConfig,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
)

import erasure
from erasure import ErasureManager
from erasure.backbones import backbone_for
from erasure.errors import ArtifactError, BypassedErasureWarning, UnsupportedModelError, WrongBaseError
from erasure.pipelines import StableDiffusionAStarPipeline


@pytest.fixture
def steered(tiny_pipe: Any) -> Any:
    erasure.erase(tiny_pipe, "cat", "sld", progress=False, warmup_steps=10)
    return tiny_pipe


def latents(pipe: Any, prompt: Any = "a photo of a cat", **options: Any) -> torch.Tensor:
    chosen = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent", **options}
    chosen.setdefault("generator", torch.Generator().manual_seed(7))
    return pipe(prompt, **chosen).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_of_a_batch_from_the_same_noise_do_not_pass_for_negative_prompts(
    steered: Any, guidance: float
) -> None:
    noise, prompts = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)), ["a cat", "a dog"]
    both = latents(steered, prompts, latents=noise.repeat(2, 1, 1, 1), guidance_scale=guidance)
    each = [latents(steered, prompt, latents=noise.clone(), guidance_scale=guidance) for prompt in prompts]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-2, atol=1e-2)


def test_embeddings_and_the_empty_prompt_are_steered_too(steered: Any, tiny_pipe_original: Any) -> None:
    told = backbone_for(tiny_pipe_original).encode(["a photo of a cat"]).tokens
    torch.testing.assert_close(latents(steered, None, prompt_embeds=told), latents(steered))
    assert not torch.equal(latents(steered, ""), latents(tiny_pipe_original, ""))


def test_guidance_that_a_callback_switches_off_goes_on_unguided(steered: Any, tiny_pipe_original: Any) -> None:
    def switch(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return given

    options = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    found = latents(steered, **options)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, latents(tiny_pipe_original, **options))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_drawing_of_few_steps_is_steered_in_spite_of_the_warm_up(
    steered: Any, tiny_pipe_original: Any, steps: int
) -> None:
    options = {"num_inference_steps": steps}
    assert not torch.equal(latents(steered, **options), latents(tiny_pipe_original, **options))


def test_a_drawing_behind_an_interrupted_one_has_no_momentum_of_it(steered: Any) -> None:
    wanted = latents(steered)

    def fail(*args: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents(steered, "a dog", callback_on_step_end=fail)
    assert torch.equal(latents(steered), wanted)


def test_a_stock_pipeline_of_pictures_that_shares_the_denoiser_is_steered(steered: Any) -> None:
    shared = StableDiffusionImg2ImgPipeline.from_pipe(steered)
    shared.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return shared(
            "a cat", image=torch.zeros(1, 3, 32, 32), strength=0.5, num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip

    found = draw()
    ErasureManager(shared).disable()
    assert not torch.equal(draw(), found)


def test_threads_that_share_a_denoiser_draw_as_each_alone(steered: Any) -> None:
    prompts, found = ["a cat", "a dog"], {}
    pipes = {prompt: copy.copy(steered) for prompt in prompts}
    for pipe in pipes.values():
        pipe.scheduler = copy.deepcopy(steered.scheduler)
    wanted = {prompt: latents(pipe, prompt) for prompt, pipe in pipes.items()}

    def draw(prompt: str) -> None:
        found[prompt] = latents(pipes[prompt], prompt)

    threads = [threading.Thread(target=draw, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[prompt], wanted[prompt]) for prompt in prompts)


def test_passes_that_are_read_have_no_rows_of_their_own(steered: Any) -> None:
    pipe = StableDiffusionAStarPipeline.from_pipe(steered)
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(latents(pipe, "a cat and a dog", subjects=["cat", "dog"])).all()


def test_guidance_with_other_rows_is_refused(steered: Any) -> None:
    pipe = StableDiffusionPAGPipeline.from_pipe(steered, pag_applied_layers=["mid"])
    with pytest.raises(UnsupportedModelError, match="guides with other rows"):
        latents(pipe, pag_scale=2.0)


def test_another_text_encoder_is_refused(tiny_pipe: Any, tiny_clip: Any, steered: Any) -> None:
    made = ErasureManager(steered).erasures["cat-sld"]
    other = copy.deepcopy(tiny_pipe)
    ErasureManager(other).unload()
    other.text_encoder = tiny_clip(other.tokenizer, seed=5)
    with pytest.raises(WrongBaseError, match="fitted to another text_encoder"):
        ErasureManager(other).add(made)
    narrow = copy.deepcopy(made)
    held = narrow.edits.safety["unet"]
    narrow.edits.safety["unet"] = held._replace(tokens=held.tokens[..., :-1])
    with pytest.raises(WrongBaseError, match="with other text encoders"):
        ErasureManager(other).add(narrow, check_base=False)


@pytest.mark.parametrize(
    "change",
    [
        {"mask": torch.ones(2, 3, dtype=torch.int64)}, {"warmup": torch.tensor(50)}, {"figures": torch.zeros(3)},
        {"figures": torch.tensor([-1.0, 0, 0, 0])}, {"tokens": torch.zeros(1, 2, 3)},
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_together_are_refused(steered: Any, change: dict[str, torch.Tensor]) -> None:
    made = copy.deepcopy(ErasureManager(steered).erasures["cat-sld"])
    made.edits.safety["unet"] = made.edits.safety["unet"]._replace(**change)
    with pytest.raises(ArtifactError, match="safety guidance"):
        made.edits.check()


def test_a_cache_that_drops_rows_is_refused(tiny_models: Any) -> None:
    pipe = tiny_models["flux"]()
    erasure.erase(pipe, "cat", "sld", progress=False)
    pipe.transformer.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 500))
    with pytest.raises(UnsupportedModelError, match="FasterCache"):
        latents(pipe, max_sequence_length=32)


def controlled(pipe: Any, residuals: float) -> StableDiffusionControlNetPipeline:
    """A pipeline with a ControlNet whose residuals are as large as is said; those of a new one are zero."""
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
    # The picture of a tiny autoencoder is twice as large as its latents, not eight times.
    controlnet.controlnet_cond_embedding = torch.nn.Conv2d(3, 32, 3, stride=2, padding=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            layer.weight.copy_(residuals * torch.randn(layer.weight.shape, generator=generator))
    return StableDiffusionControlNetPipeline(**{**pipe.components, "controlnet": controlnet})


def test_a_controlnet_is_no_way_around_it_and_none_is_warned_of(tiny_pipe: Any) -> None:
    made = erasure.erase(tiny_pipe, "cat", "sld", progress=False, attach=False)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    stock = latents(controlled(tiny_pipe, 0.1), image=picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedErasureWarning)
        ErasureManager(controlled(tiny_pipe, 0.1)).add(made, "cat")
        torch.manual_seed(0)
        steered = latents(controlled(tiny_pipe, 0.1), image=picture)
    assert torch.isfinite(steered).all()
    assert not torch.equal(steered, stock)
    # Residuals of zero change nothing, whatever rows they have.
    torch.testing.assert_close(latents(controlled(tiny_pipe, 0.0), image=picture), latents(tiny_pipe))


def test_inpainting_is_steered(steered: Any, tiny_pipe_original: Any) -> None:
    picture, mask = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    options = {"image": picture, "mask_image": mask, "strength": 1.0}
    found, stock = (
        latents(StableDiffusionInpaintPipeline(**pipe.components), **options) for pipe in (steered, tiny_pipe_original)
    )
    assert torch.isfinite(found).all()
    assert not torch.equal(found, stock)
