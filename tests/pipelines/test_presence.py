"""Whether a thing is in a picture: parts, windows, the error of the denoiser, and words on the embedded model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

import erasure
from erasure.assets.scenes import Scene, render
from erasure.backbones import StableDiffusionBackbone, backbone_for
from erasure.errors import MaskError, UnsupportedModelError
from erasure.pipelines import StableDiffusionObjectRemovalPipeline
from erasure.pipelines.presence import Asked, components, split, window


def block(height: int, width: int, *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_parts_hang_together_along_sides() -> None:
    first, corner = block(16, 16, (0, 0, 4, 4)), block(16, 16, (4, 4, 8, 8))
    found = components(first | corner)
    assert len(found) == 2
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], corner)
    snake = block(16, 16, (0, 0, 1, 16), (0, 15, 16, 16), (15, 0, 16, 16), (4, 0, 16, 1))
    assert len(components(snake)) == 1


def test_a_long_part_is_halved_where_it_is_thinnest() -> None:
    left, right, bridge = (4, 0, 12, 7), (4, 9, 12, 16), (7, 7, 8, 9)
    whole, first, second = split(block(16, 16, left, right, bridge))
    assert torch.equal(whole, first | second)
    assert not (first & second).any()
    assert 7 <= int(first.any(0).sum()) <= 8
    assert len(split(block(16, 16, (2, 2, 12, 12)))) == 1
    # Specks are no parts, and large masks are looked at with fewer pixels.
    assert split(block(64, 64, (0, 0, 2, 2))) == []
    large = split(block(300, 400, (100, 0, 200, 150), (100, 250, 200, 400)))
    assert len(large) >= 2
    assert all(part.shape == (300, 400) for part in large)


def test_a_window_shows_the_part_with_the_pictures_proportions() -> None:
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(window(picture, block(32, 48, (0, 0, 32, 48))), picture)
    zoomed = window(picture, block(32, 48, (20, 30, 32, 48)))
    assert zoomed.shape == picture.shape
    flat = picture.clone()
    flat[:, :, 16:, 24:] = 0.5
    assert (window(flat, block(32, 48, (22, 34, 30, 46))) - 0.5).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["ddim", "euler"])
def test_the_error_is_that_of_the_denoiser_at_four_noise_levels(tiny_pipe: Any, kind: str) -> None:
    """In plain arithmetic, whatever sampler the pipeline has."""
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    levels = tiny_pipe.scheduler.alphas_cumprod
    if kind == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    mine = pipe.scheduler
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    asked = Asked(backbone_for(pipe), latents)
    found = torch.stack([asked.errors("a cat")[0], asked.errors("")[1]])
    assert pipe.scheduler is mine
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone = StableDiffusionBackbone(tiny_pipe)
    text = backbone.encode(["a cat", ""])
    wanted = []
    for level in (601, 401, 201, 1):
        signal, spread = levels[level].sqrt(), (1 - levels[level]).sqrt()
        predicted = backbone.predict(signal * latents + spread * noise, torch.tensor(level), text)
        wanted.append((predicted - noise).square().mean((1, 2, 3)))
    assert (found - torch.stack(wanted).mean(0)).abs().max() < 1e-4


def test_noise_levels_that_are_not_known_are_refused(tiny_pipe: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedModelError, match="FlowMatchEulerDiscreteScheduler says that the UNet predicts"):
        Asked(backbone_for(pipe), torch.zeros(1, 4, 16, 16))
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon")
    with pytest.raises(UnsupportedModelError, match="finding things by words goes by DDIM's noise levels"):
        Asked(backbone_for(pipe), torch.zeros(1, 4, 16, 16))


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(erasure.load_pipeline("canvas-sd", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


ONE, TWO = Scene(("apple",), "noto", "white"), Scene(("cat", "dog"), "noto", "blue")


@pytest.mark.parametrize(
    ("scene", "words", "others", "which"),
    [(ONE, "apple", (), 0), (TWO, "cat", (), 0), (TWO, "dog", (), 1), (TWO, "cat", "dog", 0)],
    ids=["alone", "first of two", "second of two", "with the other named"],
)
def test_a_word_that_is_shown_is_found_in_its_place(
    canvas: Any, scene: Scene, words: str, others: Any, which: int
) -> None:
    drawn = render(scene)
    (mask,) = canvas.localize(Image.fromarray(drawn.image), words, others=others).of_words().numpy()
    assert (mask & drawn.masks[which]).sum() / (mask | drawn.masks[which]).sum() > 0.5


@pytest.mark.parametrize(
    ("scene", "words", "others"),
    [(ONE, "car", ()), (TWO, "zebra", ()), (TWO, "castle", ()), (TWO, "zebra", ["cat", "dog"]), (TWO, "car", "dog")],
    ids=["another thing", "an unknown word", "neither of two", "an unknown word beside both", "beside one"],
)
def test_a_word_that_is_not_shown_is_refused_with_its_score(
    canvas: Any, scene: Scene, words: str, others: Any
) -> None:
    image = Image.fromarray(render(scene).image)
    with pytest.raises(MaskError, match=rf"{words!r} is not found in the image: its score is -?\d+\.\d\d, wanted"):
        canvas(image, words=words, others=others)


def test_every_image_of_a_batch_is_asked(canvas: Any) -> None:
    images = [Image.fromarray(render(ONE).image), Image.fromarray(render(TWO).image)]
    found = canvas.localize(images, "apple")
    assert found.presence[0, 0] > found.least > found.presence[1, 0]
    with pytest.raises(MaskError, match="'apple' is not found in image 1"):
        found.of_words()
    assert np.isfinite(found.presence.numpy()).all()
