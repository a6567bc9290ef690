"""Pictures of what is learned: how they are fitted to the model, and things cut out of them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from erasure.assets import novel
from erasure.assets.scenes import Scene, render
from erasure.assets.world import OBJECTS, STYLES
from erasure.learning.pictures import cut_out, read_pictures


def test_things_are_cut_out_alone_and_larger() -> None:
    scene = render(Scene(("robot", "cactus"), "noto", "blue"))
    pixels = torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255
    things, masks = cut_out(pixels, torch.from_numpy(scene.masks))
    assert things.shape == (2, 3, 64, 64)
    for thing, mask, own in zip(things, masks, scene.masks, strict=True):
        assert mask.sum() > 2 * own.sum()
        assert torch.allclose(thing[:, 0, 0], pixels[:, 0, 0], atol=1e-2)
        border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert not border.any()


def test_pictures_are_fitted_and_filled_with_the_colour_of_their_edge() -> None:
    wide = Image.new("RGB", (100, 50), (200, 100, 50))
    wide.paste((0, 0, 255), (40, 10, 60, 40))
    read = read_pictures([wide], [], 1, (64, 64))
    assert read.inside[0, 0].sum() == 32 * 64
    assert torch.allclose(read.pixels[0, :, 2, 2], torch.tensor([200, 100, 50]) / 255, atol=0.01)


def test_a_turned_picture_is_turned_with_its_transparency() -> None:
    logo = Image.new("RGBA", (40, 80), (255, 0, 0, 255))
    logo.paste((0, 255, 0, 0), (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = logo.copy()
    turned.info["exif"] = exif.tobytes()
    read = read_pictures([logo], [], 1, (64, 64))
    assert read.opaque[0, 0, :31].sum() == 0
    assert read.opaque[0, 0, 33:].sum() > 0


def test_new_things_and_styles_are_new_and_have_masks() -> None:
    assert len(novel.THINGS) >= 6
    assert len(novel.STYLES) == 2
    assert not set(novel.THINGS) & set(OBJECTS)
    assert not set(novel.STYLES) & set(STYLES)
    for style in (novel.PLAIN, *novel.STYLES):
        for thing in novel.THINGS:
            scene = render(Scene((thing,), style, "white"))
            changed = np.abs(scene.image.astype(int) - scene.background).sum(2) > 60
            assert 0.1 < scene.masks[0].mean() < 0.8
            assert (changed & scene.masks[0]).sum() >= 0.5 * scene.masks[0].sum()
            assert (changed & ~scene.masks[0]).sum() <= 0.25 * scene.masks[0].sum()


def test_known_things_are_drawn_in_new_styles() -> None:
    plain, mosaic, neon = (render(Scene(("cat",), style, "white")) for style in ("noto", "mosaic", "neon"))
    assert np.array_equal(plain.masks, mosaic.masks)
    assert not np.array_equal(mosaic.image, neon.image)
