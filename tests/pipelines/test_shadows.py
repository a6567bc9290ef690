"""Masks that take the shadow along, on scenes whose shadow is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from erasure.assets.scenes import RenderedScene, Scene, Shadow, render
from erasure.pipelines.shadows import EDGE, background_of, dilated, nearer, with_shadows

THROWN = Shadow(dx=7, dy=5, darkness=0.4, blur=1.0)


def pixels(drawn: RenderedScene) -> Tensor:
    return torch.from_numpy(drawn.image).permute(2, 0, 1)[None] / 255


def truth(scene: Scene, target: int) -> np.ndarray:
    """Pixels beside the object, and not on its soft edge, that its shadow changes."""
    with_it, without = render(scene, shadow=THROWN), render(scene, target, THROWN)
    changed = np.abs(with_it.image.astype(int) - without.image).max(-1) > 12
    return changed & ~dilated(torch.from_numpy(with_it.masks[target]), EDGE).numpy()


@pytest.mark.parametrize("background", ["white", "blue", "pink", "green"])
def test_a_shadow_on_one_colour_is_found_and_the_neighbour_stays(background: str) -> None:
    scene = Scene(("apple", "umbrella"), "noto", background)
    drawn = render(scene, shadow=THROWN)
    mask = torch.from_numpy(drawn.masks[:1])
    grown = with_shadows(mask, pixels(drawn))[0].numpy()
    shadow = truth(scene, 0)
    assert shadow.sum() > 30
    assert (grown & shadow).sum() / shadow.sum() > 0.85
    # A pixel or two of the neighbour's edge, where the shadow ends at it.
    assert (grown & drawn.masks[1]).sum() <= 0.1 * drawn.masks[1].sum()
    assert not (grown & ~dilated(torch.from_numpy(~drawn.masks[1]), 4).numpy()).any()
    assert (grown & mask[0].numpy()).sum() == mask.sum(), "nothing of the mask is lost"


@pytest.mark.parametrize("background", ["white", "blue", "gradient", "striped", "checked"])
def test_without_a_shadow_next_to_nothing_is_added(background: str) -> None:
    drawn = render(Scene(("apple", "umbrella"), "noto", background))
    masks = torch.from_numpy(drawn.masks)
    for mask, grown in zip(masks, with_shadows(masks, pixels(drawn).expand(2, -1, -1, -1)), strict=True):
        assert not (grown & ~dilated(mask, 2 * EDGE)).any()


def test_shadows_of_large_images_are_found_and_batches_are_their_parts() -> None:
    scene = Scene(("apple", "umbrella"), "noto", "white")
    drawn = render(scene, shadow=THROWN)
    masks, images = torch.from_numpy(drawn.masks), pixels(drawn).expand(2, -1, -1, -1)
    large = with_shadows(
        masks.repeat_interleave(8, 1).repeat_interleave(8, 2), images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    )
    assert large.shape == (2, 512, 512)
    seen = large[:, 4::8, 4::8].numpy()
    for index, grown in enumerate(seen):
        shadow = truth(scene, index)
        assert (grown & shadow).sum() / shadow.sum() > 0.75
        assert (grown & drawn.masks[1 - index]).sum() <= 0.02 * drawn.masks[1 - index].sum()
    small = with_shadows(masks, images)
    assert torch.equal(with_shadows(masks[1:], images[1:])[0], small[1])


def test_masks_of_nothing_and_of_everything_stay() -> None:
    image = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    masks = torch.stack([torch.zeros(20, 30, dtype=torch.bool), torch.ones(20, 30, dtype=torch.bool)])
    assert torch.equal(with_shadows(masks, image), masks)


def test_parts() -> None:
    line = torch.zeros(1, 9, dtype=torch.bool)
    line[0, [0, 1, 2, 4, 5]] = True
    start = torch.zeros_like(line)
    start[0, 0] = True
    nobody, end = torch.zeros_like(line), torch.zeros_like(line)
    end[0, 2] = True
    assert nearer(start, nobody, line)[0].tolist() == [True] * 3 + [False] * 6
    assert nearer(start, end, line)[0].tolist() == [True] * 2 + [False] * 7
    colours = torch.tensor([[1.0, 1.0, 0.0]]).expand(3, -1)
    assert background_of(colours).tolist() == [[0.0] * 3, [1.0] * 3]
    # A colour that is rarer and only darker than another is that one in the shadow; a rarer brighter one is a colour.
    blue, shade = [0.5, 0.75, 1.0], [0.25, 0.375, 0.5]
    for many, few, wanted in ((blue, shade, [blue]), (shade, blue, [shade, blue])):
        found = background_of(torch.tensor([many] * 6 + [few] * 2).T)
        assert torch.allclose(found, torch.tensor(wanted))
