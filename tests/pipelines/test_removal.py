"""Object removal on tiny pipelines of SD and SDXL: inputs, equivalences, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from erasure.backbones import text_towers
from erasure.errors import AttachError, BypassedErasureWarning, MaskError, OptionError, UnsupportedModelError
from erasure.pipelines import StableDiffusionObjectRemovalPipeline, StableDiffusionXLObjectRemovalPipeline
from erasure.pipelines.free_u import FreeU, free_u
from erasure.pipelines.localization import prompt_of
from erasure.pipelines.removal import PRESETS


@pytest.fixture
def pipe(stock: Any) -> Any:
    is_xl = isinstance(stock, StableDiffusionXLPipeline)
    kind = StableDiffusionXLObjectRemovalPipeline if is_xl else StableDiffusionObjectRemovalPipeline
    made = kind.from_pipe(stock)
    made.set_progress_bar_config(disable=True)
    return made


def picture(height: int = 32, width: int = 32, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def square(height: int = 32, width: int = 32, at: int = 8) -> Image.Image:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[at : at + 8, at : at + 8] = 255
    return Image.fromarray(mask)


def run(pipe: Any, image: Any = None, mask: Any = None, **options: Any) -> Tensor:
    settings = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe(picture() if image is None else image, square() if mask is None else mask, **settings | options).images


# What comes in ------------------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same(pipe: Any) -> None:
    image, mask = picture(), square()
    wanted = run(pipe, image, mask)
    pixels = np.array(image)
    for form in (pixels, pixels.astype(np.float32) / 255, torch.from_numpy(pixels).permute(2, 0, 1) / 255):
        assert torch.equal(run(pipe, form, mask), wanted)
    for form in (np.asarray(mask), np.asarray(mask) > 0, torch.from_numpy(np.array(mask))[None] / 255.0):
        assert torch.equal(run(pipe, image, form), wanted)


def test_a_batch_with_masks_of_its_own_equals_its_parts(pipe: Any) -> None:
    images, masks = [picture(seed=1), picture(seed=2)], [square(), square(at=16)]
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    both = run(pipe, images, masks, generator=seeds(), num_images_per_prompt=2)
    alone = [
        run(pipe, images[i], masks[i], generator=seeds()[2 * i : 2 * i + 2], num_images_per_prompt=2) for i in range(2)
    ]
    assert both.shape == (4, 3, 32, 32)
    assert (both - torch.cat(alone)).abs().max() < 1e-4


@pytest.mark.parametrize(("height", "width"), [(32, 48), (40, 24), (35, 47), (75, 100)])
def test_the_size_and_the_surroundings_are_those_that_came(pipe: Any, height: int, width: int) -> None:
    """Sizes that 8 does not divide too: nothing is stretched."""
    image, mask = picture(height, width), square(height, width)
    made = pipe(image, mask, num_inference_steps=3, blend_radius=1.0).images[0]
    assert made.size == (width, height)
    # Eight pixels of mask, two that it grows by, and the soft edge.
    changed = (np.array(made) != np.array(image)).any(-1)
    assert changed[8:16, 8:16].any()
    changed[2:22, 2:22] = False
    assert not changed.any()


def test_another_size_may_be_asked_for(pipe: Any) -> None:
    made = run(pipe, picture(35, 47), square(35, 47), height=40, width=54)
    assert made.shape == (1, 3, 40, 54)
    for side in (0, 7, True, 32.0):
        with pytest.raises(OptionError, match="height and width are"):
            run(pipe, height=side)


def test_a_mask_at_another_size_is_laid_over_the_image(pipe: Any) -> None:
    half = square().resize((16, 16), Image.Resampling.BOX)
    assert torch.equal(run(pipe, mask=half), run(pipe))


def test_an_empty_mask_gives_the_image_back(pipe: Any) -> None:
    nothing = Image.new("L", (32, 32))
    source = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255
    with pytest.warns(UserWarning, match="empty"):
        assert torch.allclose(run(pipe, mask=nothing), source)
    with pytest.warns(UserWarning, match="1 of 2"):
        both = run(pipe, [picture(), picture()], [nothing, square()])
    assert torch.allclose(both[:1], source)
    assert not torch.allclose(both[1:], source)


def test_what_cannot_be_removed_is_refused(pipe: Any) -> None:
    with pytest.raises(MaskError, match="whole image"):
        run(pipe, mask=Image.new("L", (32, 32), 255))
    with pytest.raises(MaskError, match="nothing says what"):
        pipe(picture())
    with pytest.raises(MaskError, match="32x16 pixels for an image of 32x32"):
        run(pipe, mask=square(16, 32, at=4))
    with pytest.raises(MaskError, match="2 masks for 3 images"):
        run(pipe, [picture()] * 3, [square()] * 2)
    with pytest.raises(MaskError, match="NaN"):
        run(pipe, mask=torch.full((32, 32), torch.nan))
    with pytest.raises(MaskError, match="NaN"):
        run(pipe, torch.full((3, 32, 32), torch.nan))
    with pytest.raises(OptionError, match="no preset 'sd9'"):
        run(pipe, preset="sd9")
    with pytest.raises(OptionError, match="strength"):
        run(pipe, strength=0.0)
    with pytest.raises(OptionError, match="shared_trunk"):
        run(pipe, layers="all", shared_trunk=True)


# What it does -------------------------------------------------------------------------------------------------------


def test_a_shared_trunk_equals_two_whole_branches(pipe: Any) -> None:
    shared, whole = (run(pipe, shared_trunk=shared) for shared in (True, False))
    assert (shared - whole).abs().max() < 1e-5
    assert (shared - run(pipe, redirect=False)).abs().max() > 1e-3


def test_guidance_is_taken_between_the_branches(pipe: Any) -> None:
    """With scale s after one step: e = e0 + s (e1 - e0), so latents are linear in s."""
    step = {"num_inference_steps": 1, "strength": 1.0, "output_type": "pt"}
    seen: dict[float, Tensor] = {}

    def keep(scale: float) -> Any:
        def callback(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen[scale] = tensors["latents"].clone()
            return tensors

        return callback

    for scale in (1.0, 3.0, 5.0):
        run(pipe, removal_guidance_scale=scale, callback_on_step_end=keep(scale), **step)
    assert (seen[1.0] + seen[5.0] - 2 * seen[3.0]).abs().max() < 1e-3 * seen[5.0].abs().max()
    assert (seen[1.0] - seen[5.0]).abs().max() > 1e-3


def test_surroundings_are_the_sources_own_pixels(pipe: Any) -> None:
    source = torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 255
    made = run(pipe, blend_radius=1.0)[0]
    assert torch.allclose(made[:, 24:], source[:, 24:], atol=1e-6)
    assert not torch.allclose(made[:, 8:16, 8:16], source[:, 8:16, 8:16], atol=0.01)


def test_inversion_does_not_depend_on_the_noise_outside_the_hole(pipe: Any) -> None:
    """Everything comes from the image: two seeds give the same."""
    first, second = (run(pipe, sampler="inversion", generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(run(pipe), run(pipe, generator=torch.Generator().manual_seed(1)))


def test_inverted_latents_sample_back_to_the_image(tiny_pipe: Any) -> None:
    """DDIM is nearly reversible: with attention left alone and many steps, the hole comes back as it was."""
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    options = {"redirect": False, "blend_radius": 0.0, "mask_blur": 0, "strength": 0.4}
    plain = pipe.vae.decode(pipe.encode_images(pipe.read_images(picture())) / pipe.vae.config.scaling_factor).sample
    wanted = (plain / 2 + 0.5).clamp(0, 1)
    errors = [
        (run(pipe, sampler="inversion", num_inference_steps=steps, **options) - wanted).abs().mean()
        for steps in (5, 40)
    ]
    assert errors[1] < errors[0] / 2


def test_the_papers_schedule(pipe: Any) -> None:
    """Steps of the released code at 50 steps and strength 0.8: 40 of them, 780, 760 and so on down to 0."""
    seen: list[int] = []

    def keep(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(int(t))
        return tensors

    before = pipe.scheduler
    preset = "official-sdxl" if "XL" in type(pipe).__name__ else "official-sd15"
    pipe(picture(), square(), preset=preset, redirect=False, callback_on_step_end=keep)
    assert seen == list(range(780, -1, -20))
    assert pipe.scheduler is before
    settings = PRESETS[preset]
    assert (settings.removal_guidance_scale, settings.suppression_scale, settings.strength) == (9.0, 0.3, 0.8)
    assert settings.suppression_share * len(seen) == 10


@pytest.mark.parametrize(
    ("preset", "blur", "factors"),
    [
        # inference/SIP.py with AAS/data.py (13); the notebook's line for 1.5; main.py. FreeU: s1, s2, b1, b2.
        ("official-sd21", 13, (0.9, 0.2, 1.4, 1.6)),
        ("official-sd15", 13, (0.9, 0.2, 1.5, 1.6)),
        ("official-sdxl", 77, None),
    ],
)
def test_every_number_of_the_official_presets_is_that_of_the_papers_code(
    preset: str, blur: int, factors: tuple[float, ...] | None
) -> None:
    """Anonym0u3/AttentiveEraser at 0b7881d; its counter of suppressed steps runs from 0 to 9 of the 40 executed."""
    wanted = {
        "num_inference_steps": 50, "strength": 0.8, "removal_guidance_scale": 9.0, "redirect": True,
        "suppression_scale": 0.3, "suppression_share": 10 / 40, "log_weight": None, "layers": "decoder",
        "mask_blur": blur, "sampler": "blended", "blend_radius": 0.0, "shared_trunk": None,
        "released_scheduler": True, "sample_latents": True, "free_u": factors, "shadow": False, "crop": False,
        "crop_context": 0.5,
    }  # fmt: skip
    assert dataclasses.asdict(PRESETS[preset]) == wanted
    assert PRESETS[preset].executed == 40


def test_the_default_preset_differs_from_the_papers_code_where_it_says_so() -> None:
    changed = {"mask_blur": 13, "blend_radius": 0.0, "released_scheduler": True, "sample_latents": True,
               "free_u": (0.9, 0.2, 1.4, 1.6)}  # fmt: skip
    assert dataclasses.replace(PRESETS["default"], **changed) == PRESETS["official-sd21"]


def test_latents_are_drawn_as_the_stock_pipeline_draws_them(tiny_pipe: Any) -> None:
    """Without redirection it is the stock inpainting pipeline, whose generator draws latents ahead of the noise."""
    from diffusers import StableDiffusionInpaintPipeline

    pipe, stock = (
        kind.from_pipe(tiny_pipe) for kind in (StableDiffusionObjectRemovalPipeline, StableDiffusionInpaintPipeline)
    )
    for each in (pipe, stock):
        each.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "strength": 0.8, "output_type": "pt"}
    plain = {"redirect": False, "blend_radius": 0.0, "mask_blur": 0}
    made = run(pipe, sample_latents=True, **plain, **settings)
    wanted = stock(
        "", picture(), square(), guidance_scale=1.0, generator=torch.Generator().manual_seed(0), height=32, width=32,
        **settings,
    ).images  # fmt: skip
    assert (made - wanted).abs().max() < 1e-5
    assert (run(pipe, **plain, **settings) - made).abs().max() > 1e-4


def test_free_u_is_that_of_the_papers_code(tiny_pipe: Any) -> None:
    """Layers by the width of their features, in plain arithmetic; diffusers goes by blocks."""
    unet = tiny_pipe.unet
    factors = FreeU(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    given: list[Tensor] = []
    for block in unet.up_blocks:
        for layer in block.resnets:
            layer.norm1.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    call = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 9, torch.zeros(1, 7, 32))
    plain = unet(*call).sample
    before = list(given)
    given.clear()
    with free_u(unet, factors):
        assert (unet(*call).sample - plain).abs().max() > 1e-3
    assert torch.equal(unet(*call).sample, plain)

    def filtered(skip: Tensor, scale: float) -> Tensor:
        frequencies = torch.fft.fftshift(torch.fft.fft2(skip), dim=(-2, -1))
        middle = skip.shape[-1] // 2
        frequencies[..., middle - 1 : middle + 1, middle - 1 : middle + 1] *= scale
        return torch.fft.ifft2(torch.fft.ifftshift(frequencies, dim=(-2, -1))).real

    # The first layer has all of what it was given: 64 features, the widest, and 64 of the skip connection.
    own, skip = before[0][:, :64], before[0][:, 64:]
    wanted = torch.cat([1.4 * own[:, :32], own[:, 32:], filtered(skip, 0.9)], 1)
    assert (given[0] - wanted).abs().max() < 1e-4
    tiny_pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    with pytest.raises(UnsupportedModelError, match="FreeU is on already"):
        run(StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe), preset="official-sd21")


@pytest.mark.parametrize(
    "options",
    [
        {"strength": float("nan")}, {"strength": 1.5}, {"strength": True}, {"num_inference_steps": 0},
        {"num_inference_steps": 2.5}, {"removal_guidance_scale": -1.0}, {"suppression_share": 2.0},
        {"mask_blur": -7}, {"mask_blur": 8}, {"blend_radius": float("inf")}, {"redirect": 1}, {"log_weight": "0"},
        {"sampler": "none"}, {"free_u": (1.0, 1.0)}, {"preset": 3}, {"output_type": "latent"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_without_meaning_are_refused(tiny_pipe: Any, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        run(StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe), **options)


def test_words_stand_in_for_a_mask(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pipe.localize(picture(), "cat", num_inference_steps=4, power=0)
    assert found.masks.shape == found.scores.shape == (1, 1, 32, 32)
    assert found.masks.any()
    # The scores of random weights mean nothing.
    found = found._replace(presence=torch.ones(1, 1))
    monkeypatch.setattr(pipe, "localize", lambda *_, **__: found)
    settings = {"num_inference_steps": 4, "output_type": "pt"}
    by_words = pipe(picture(), words="cat", generator=torch.Generator().manual_seed(0), **settings).images
    assert torch.equal(by_words, run(pipe, mask=found.masks[0, 0], **settings))
    monkeypatch.undo()
    with pytest.raises(MaskError, match="names nothing"):
        pipe.localize(picture(), "the ")
    with pytest.raises(MaskError, match=r"'cat' is not found in the image: its score is -0\.50, wanted: 0\.06"):
        found._replace(presence=torch.tensor([[-0.5]])).of_words()


def test_every_name_has_a_mask_in_every_image(tiny_pipe: Any) -> None:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    many = pipe.localize([picture(), picture(seed=1)], ["cat", "the dog"], others=["apple"], num_inference_steps=4)
    assert many.masks.shape == (2, 3, 32, 32)
    assert (many.masks.sum(1) <= 1).all()
    one = pipe.localize(picture(), "cat", others="dog", num_inference_steps=4)
    assert one.names == ("cat", "dog")
    assert one.presence.shape == (1, 1)


def test_the_name_of_a_learned_token_begins_behind_its_article(tiny_pipe: Any, teach: Any) -> None:
    teach(tiny_pipe, "a", "cat")
    tower = text_towers(tiny_pipe)[0]
    for name, prompt in (("<my-pet>", "a <my-pet>"), ("the <my-pet>", "the <my-pet>")):
        assert prompt_of(tower, [name]) == (prompt, [slice(2, 2 + len(tower.word_ids("<my-pet>")))])
        assert tower.prompt_ids(prompt)[2:4] == tower.word_ids("<my-pet>")


def test_an_inpainting_unet_is_given_what_the_stock_pipeline_gives_it(tiny_pipe: Any) -> None:
    """Nine channels: without redirection, and with the VAE's mode for its draw, it is the stock pipeline."""
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tiny_pipe.unet = UNet2DConditionModel.from_config(tiny_pipe.unet.config, in_channels=9).eval()
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    stock = StableDiffusionInpaintPipeline.from_pipe(tiny_pipe)
    for each in (pipe, stock):
        each.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "strength": 1.0, "output_type": "pt"}
    made = run(pipe, redirect=False, blend_radius=0.0, mask_blur=0, **settings)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    masked = np.array(picture()).astype(np.float32) / 255
    masked[8:16, 8:16] = 0.5
    latents = pipe.encode_images(torch.from_numpy(masked).permute(2, 0, 1)[None])
    wanted = stock(
        "", picture(), square(), masked_image_latents=latents, latents=noise, guidance_scale=1.0, **settings
    ).images  # fmt: skip
    assert (made - wanted).abs().max() < 1e-5
    assert (run(pipe, blend_radius=0.0, **settings) - made).abs().max() > 1e-3


def test_the_callers_callback_gets_what_it_asks_for(pipe: Any) -> None:
    seen = []

    def watch(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(sorted(tensors))
        return tensors

    run(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [["latents", "prompt_embeds"]] * 4


# What stays ---------------------------------------------------------------------------------------------------------


def test_twice_the_same_and_the_stock_pipeline_as_before(stock: Any, pipe: Any, tensors_of: Any, draw: Any) -> None:
    before, processors = draw(stock), dict(stock.unet.attn_processors)
    tensors = tensors_of(stock)
    assert torch.equal(run(pipe), run(pipe))
    assert torch.equal(draw(stock), before)
    assert stock.unet.attn_processors.keys() == processors.keys()
    assert all(stock.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert all(torch.equal(value, tensors[key]) for key, value in tensors_of(stock).items())


def test_a_killed_run_leaves_nothing_behind(stock: Any, pipe: Any, draw: Any) -> None:
    before, own = draw(stock), pipe.scheduler

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    for sampler in ("blended", "inversion"):
        with pytest.raises(KeyboardInterrupt):
            run(pipe, sampler=sampler, preset="official-sd15", callback_on_step_end=stop)
    assert pipe.scheduler is own
    assert torch.equal(draw(stock), before)


def test_half_precision_is_left_as_it_is(tiny_pipe: Any) -> None:
    half = copy.deepcopy(tiny_pipe).to(torch.bfloat16)
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(half)
    assert half.unet.dtype == pipe.unet.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(run(pipe)).all()


def test_erasures_stay_in_force(tiny_pipe: Any) -> None:
    import erasure

    erasure.erase(tiny_pipe, "cat", "uce", vocabulary=8, progress=False)
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    with_it = run(pipe, prompt="a cat")
    assert pipe.verify_erasures() > 0
    pipe.unload_erasures()
    assert not torch.equal(run(pipe, prompt="a cat"), with_it)


@pytest.mark.parametrize("sampler", ["blended", "inversion"])
def test_negative_prompts_are_texts_or_lists(pipe: Any, sampler: str) -> None:
    images = [picture(seed=0), picture(seed=1)]
    settings = {"guidance_scale": 3.0, "sampler": sampler, "num_inference_steps": 2, "strength": 1.0}

    def drawn(**options: Any) -> Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        return run(pipe, images, generator=seeds, num_images_per_prompt=2, **settings, **options)

    one = drawn(negative_prompt="a cat")
    assert torch.equal(drawn(negative_prompt=["a cat", "a cat"]), one)
    # An image's own goes to all that is made of it.
    each = drawn(negative_prompt=["a cat", "a dog"])
    assert torch.equal(each[:2], one[:2])
    assert not torch.equal(each[2:], one[2:])


def test_prompts_are_texts_or_lists_of_the_images_number(pipe: Any) -> None:
    images = [picture(seed=0), picture(seed=1)]

    def drawn(**options: Any) -> Tensor:
        return run(pipe, images, generator=[torch.Generator().manual_seed(i) for i in range(2)], **options)

    one = drawn(prompt="a cat")
    assert torch.equal(drawn(prompt=["a cat", "a cat"]), one)
    each = drawn(prompt=("a cat", "a dog"))
    assert (each[0] - one[0]).abs().max() < 1e-6
    assert (each[1] - one[1]).abs().max() > 1e-6
    for name in ("prompt", "negative_prompt"):
        for given in (["a cat"], ["a cat"] * 3, 7, ["a cat", None], []):
            with pytest.raises(OptionError, match=f"{name} "):
                drawn(**{name: given})


def test_a_negative_prompt_that_does_nothing_is_said(tiny_pipe: Any) -> None:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    with pytest.warns(UserWarning, match="negative_prompt= does nothing"):
        run(pipe, negative_prompt="a cat")


def test_a_mask_that_leaves_next_to_nothing_still_redirects_or_is_refused(tiny_pipe: Any) -> None:
    """Once it is grown it covers every latent pixel; a frame of one latent pixel is left."""
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    nearly = np.zeros((32, 32), dtype=bool)
    nearly[2:30, 2:30] = True
    made = run(pipe, mask=nearly)
    assert torch.isfinite(made).all()
    assert (made - run(pipe, mask=nearly, redirect=False)).abs().max() > 1e-3
    nearly[1:31, 1:31] = True
    with pytest.raises(MaskError, match="leaves less than 2 pixels"):
        run(pipe, mask=nearly)


def warned(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, BypassedErasureWarning)]


@pytest.mark.parametrize("channels", [4, 9])
def test_a_picture_that_goes_past_an_erasure_is_said_once(tiny_pipe: Any, channels: int) -> None:
    import erasure

    tiny_pipe.unet = copy.deepcopy(tiny_pipe.unet)
    if channels == 9:
        tiny_pipe.unet.conv_in = torch.nn.Conv2d(9, 32, 3, padding=1)
        tiny_pipe.unet.register_to_config(in_channels=9)
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    erasure.erase(pipe, "cat", "uce", vocabulary=8, progress=False)
    (said,) = warned(lambda: run(pipe))
    assert "uce" in said
    assert "picture" in said
    # Looking for something draws nothing, wherever it is asked for.
    assert warned(lambda: pipe.localize(picture(64, 64), "dog", num_inference_steps=4)) == []
    assert any("negative prompt" in text for text in warned(lambda: run(pipe, negative_prompt="a cat")))


def test_a_look_for_something_sees_one_state(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import erasure

    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    erasure.erase(pipe, "cat", "uce", vocabulary=8, progress=False)
    monkeypatch.setattr(pipe, "_read_maps", lambda *_: pipe.disable_erasures())
    with pytest.raises(AttachError, match="inside of a call"):
        pipe.localize(picture(64, 64), "dog")
    assert pipe.verify_erasures() > 0
