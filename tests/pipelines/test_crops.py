"""Removal from pictures that are larger than what the model draws: which parts are cut out, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from erasure.errors import MaskError, OptionError
from erasure.pipelines import StableDiffusionObjectRemovalPipeline
from erasure.pipelines.crops import connected_parts, plan_crops, worked_size

SIDE = 32


def holes(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Tensor:
    """A mask `(height, width)` of boxes `(top, left, height, width)`."""
    mask = torch.zeros(size, dtype=torch.bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


MASKS: dict[str, tuple[Tensor, int]] = {
    "one": (holes((100, 120), (40, 50, 10, 8)), 1),
    "in a corner": (holes((100, 120), (0, 112, 10, 8)), 1),
    "at the lower edge": (holes((100, 120), (95, 3, 5, 20)), 1),
    "one pixel": (holes((100, 120), (99, 119, 1, 1)), 1),
    "two near ones": (holes((100, 120), (10, 10, 5, 5), (18, 20, 5, 5)), 1),
    "two far ones": (holes((100, 120), (10, 10, 5, 5), (80, 100, 5, 5)), 2),
    "three, of which two are near": (holes((100, 120), (10, 10, 5, 5), (80, 100, 5, 5), (20, 20, 4, 4)), 2),
    "larger than the model's size": (holes((100, 120), (20, 30, 50, 60)), 1),
    "a small one beside a large one": (holes((100, 120), (20, 30, 50, 40), (50, 75, 4, 4)), 1),
    "all of the height": (holes((100, 300), (0, 100, 100, 90)), 1),
    "a picture of the model's size": (holes((32, 32), (4, 4, 8, 8)), 1),
    "a picture below it": (holes((20, 24), (4, 4, 8, 8)), 1),
    "a strip": (holes((9, 400), (2, 200, 4, 30)), 1),
    "letters all over": (holes((300, 400), *((8, 12 * i, 3, 3) for i in range(30))), 15),
    "nothing": (holes((100, 120)), 0),
    "a large picture": (holes((1500, 2000), (30, 30, 400, 300), (1400, 1900, 20, 20)), 2),
}


@pytest.mark.parametrize("name", MASKS)
def test_crops_cover_the_mask_once_and_lie_in_the_picture(name: str) -> None:
    mask, most = MASKS[name]
    crops = plan_crops(mask, SIDE, 0.5)
    assert (len(crops) > 0) == bool(mask.any())
    assert len(crops) <= most
    if most <= 2:
        assert len(crops) == most
    covered = torch.zeros(mask.shape, dtype=torch.int)
    for box, own in crops:
        assert box.top >= 0
        assert box.left >= 0
        assert box.top + box.height <= mask.shape[0]
        assert box.left + box.width <= mask.shape[1]
        assert own.shape == (box.height, box.width)
        covered[box.window] += own
        assert min(box.height, SIDE) == min(mask.shape[0], SIDE), "never less than the model draws, if it is there"
        assert max(worked_size(box, SIDE)) <= SIDE
        if box.height < mask.shape[0] and box.width < mask.shape[1]:
            assert box.height == box.width
            assert worked_size(box, SIDE) == (SIDE, SIDE)
    assert torch.equal(covered, mask.int())


def test_a_crop_shows_as_much_around_the_mask_as_is_asked_for() -> None:
    mask = holes((400, 400), (150, 150, 100, 60))
    for context, side in ((0.1, 120), (0.5, 200), (1.0, 300)):
        ((box, _),) = plan_crops(mask, SIDE, context)
        # Parts are told apart on cells of four pixels here, so that a crop may be a little larger.
        assert side <= box.height == box.width <= side + 8 * (1 + 2 * context)
        for start, extent, first, length in ((box.top, box.height, 150, 100), (box.left, box.width, 150, 60)):
            assert min(first - start, start + extent - first - length) >= 100 * context - 1


def test_parts_touch_over_corners() -> None:
    cells = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    labels = connected_parts(cells)
    assert labels[0, 0] == labels[1, 1] != labels[0, 3]
    assert len(labels[cells].unique()) == 3
    assert not labels[~cells].any()


# On a pipeline -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tiny_pipe: Any) -> Any:
    made = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    made.set_progress_bar_config(disable=True)
    return made


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def run(pipe: Any, image: Any, mask: Any, **options: Any) -> np.ndarray:
    settings = {"num_inference_steps": 2, "strength": 1.0, "generator": torch.Generator().manual_seed(0)}
    return np.asarray(pipe(image, mask, **settings | options).images[0])


def test_the_tiny_model_draws_what_these_tests_say(pipe: Any) -> None:
    assert min(pipe._backbone.latents.side) * pipe._backbone.latents.factor == SIDE


@pytest.mark.parametrize(
    "name", ["one", "in a corner", "at the lower edge", "one pixel", "two far ones", "larger than the model's size",
             "all of the height", "a picture below it", "a strip"],
)  # fmt: skip
def test_everything_away_from_the_mask_is_the_pictures_own(name: str, pipe: Any) -> None:
    mask, _ = MASKS[name]
    image = picture(*mask.shape)
    seen: list[tuple[int, ...]] = []

    def watch(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tuple(tensors["latents"].shape[2:]))
        return tensors

    made = run(pipe, image, mask, crop=True, callback_on_step_end=watch)
    assert made.shape == np.asarray(image).shape
    assert max(max(size) for size in seen) * pipe._backbone.latents.factor <= SIDE
    changed = (made != np.asarray(image)).any(-1)
    for box, own in plan_crops(mask, SIDE, 0.5):
        assert changed[box.window][own.numpy()].any()
        # What it grows by and three radii of the soft edge, which is 15 of 512, both of the crop's size.
        reach = 3 + round(max(box.height, box.width) * (0.1 + 45 / 512))
        near = torch.nn.functional.max_pool2d(own[None, None].float(), 2 * reach + 1, 1, reach)[0, 0] > 0
        changed[box.window] &= ~near.numpy()
    assert not changed.any()


def test_a_picture_of_the_models_size_is_worked_on_as_without_crops(pipe: Any) -> None:
    image, mask = picture(32, 32), holes((32, 32), (8, 8, 8, 8))
    with_it, without = (run(pipe, image, mask, crop=crop).astype(int) for crop in (True, False))
    assert np.abs(with_it - without).max() <= 1


def test_a_crop_is_what_the_part_alone_would_be(pipe: Any) -> None:
    """Of the model's size around a small mask: cut out by hand, worked on alone, put back."""
    image, mask = picture(96, 128), holes((96, 128), (40, 60, 8, 8))
    ((box, own),) = plan_crops(mask, SIDE, 0.5)
    made = run(pipe, image, mask, crop=True).astype(int)
    part = Image.fromarray(np.asarray(image)[box.window])
    assert np.abs(made[box.window] - run(pipe, part, own)).max() <= 1


def test_far_parts_are_both_taken_out_and_each_result_has_its_own_noise(pipe: Any) -> None:
    image, mask = picture(96, 128), MASKS["two far ones"][0][:96]
    mask = torch.nn.functional.pad(mask, (0, 8))
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = pipe(image, mask, crop=True, num_inference_steps=2, strength=1.0, generator=seeds, num_images_per_prompt=2,
                prompt="a cat").images  # fmt: skip
    first, second = map(np.asarray, both)
    for box, own in plan_crops(mask, SIDE, 0.5):
        assert (first[box.window][own] != np.asarray(image)[box.window][own]).any()
        assert (first[box.window][own] != second[box.window][own]).any()
    alone = run(pipe, image, mask, crop=True, prompt="a cat")
    assert np.abs(first.astype(int) - alone).max() <= 1


def test_images_of_a_batch_have_masks_of_their_own_and_empty_ones_come_back(pipe: Any) -> None:
    image, mask = picture(96, 128), holes((96, 128), (40, 60, 8, 8))
    with pytest.warns(UserWarning, match="1 of 2"):
        one, other = pipe(
            [image, image], [torch.zeros_like(mask), mask], crop=True, num_inference_steps=2, strength=1.0
        ).images
    assert np.array_equal(np.asarray(one), np.asarray(image))
    assert not np.array_equal(np.asarray(other), np.asarray(image))


def test_what_crops_cannot_do_is_refused(pipe: Any) -> None:
    image, mask = picture(96, 128), holes((96, 128), (40, 60, 8, 8))
    with pytest.raises(OptionError, match="latents="):
        run(pipe, image, mask, crop=True, latents=torch.zeros(1, 4, 16, 16))
    with pytest.raises(OptionError, match="crop_context"):
        run(pipe, image, mask, crop=True, crop_context=0.0)
    with pytest.raises(MaskError, match="whole image"):
        run(pipe, image, torch.ones_like(mask), crop=True)


def test_words_are_looked_for_in_what_the_model_sees_at_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from erasure.pipelines.localization import Localization

    seen = []

    def localize(source: Tensor, words: str, others: Any = ()) -> Localization:
        seen.append(tuple(source.shape[2:]))
        mask = holes(seen[-1], (8, 4, 8, 8))[None, None]
        return Localization(mask, mask.float(), source, ("cat",), torch.ones(1, 1))

    monkeypatch.setattr(pipe, "localize", localize)
    image = picture(96, 128)
    made = pipe(image, words="cat", crop=True, num_inference_steps=2, strength=1.0).images[0]
    assert seen == [(24, 32)]
    changed = (np.asarray(made) != np.asarray(image)).any(-1)
    assert changed[36:60, 20:44].all(-1).any()
    assert not changed[:, 100:].any()
