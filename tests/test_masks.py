"""What a mask covers, however it was drawn and exported."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.errors import MaskError
from erasure.masks import blend, grow, latent_aligned, read_masks

DRAWN = np.zeros((32, 48), dtype=bool)
DRAWN[8:20, 8:30] = True
BOX = (8, 8, 30, 20)


def brush(mode: str, ground: Any, *colours: Any) -> Image.Image:
    """A picture with the mask's box in vertical stripes of some colours."""
    image = Image.new(mode, (48, 32), ground)
    left, top, right, bottom = BOX
    edges = np.linspace(left, right, len(colours) + 1).astype(int)
    for colour, start, end in zip(colours, edges[:-1], edges[1:], strict=True):
        image.paste(colour, (int(start), top, int(end), bottom))
    return image


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(DRAWN.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 200, 0, 0] if transparent else [0, 0, 0, 255, 255, 255])
    if transparent:
        image.info["transparency"] = 0
    return image


def reopened(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


DRAWINGS = {
    "white on black": brush("L", 0, 255),
    "bilevel": brush("1", 0, 1),
    "white on black in colours": brush("RGB", (0, 0, 0), (255, 255, 255)),
    "red, blue and brown on black": brush("RGB", (0, 0, 0), (255, 0, 0), (0, 0, 255), (110, 60, 20)),
    "white on transparent black": brush("RGBA", (0, 0, 0, 0), (255,) * 4),
    "white on transparent white": brush("RGBA", (255, 255, 255, 0), (255,) * 4),
    "black on transparent": brush("RGBA", (255, 255, 255, 0), (0, 0, 0, 255)),
    "every colour on transparent": brush(
        "RGBA", (0, 0, 0, 0), *((*c, 255) for c in ((255, 0, 0), (0, 0, 255), (90, 50, 10), (255, 255, 0)))
    ),
    "half opaque brush on transparent": brush("RGBA", (0, 0, 0, 0), (255, 0, 0, 100)),
    "white on black, opaque": brush("RGBA", (0, 0, 0, 255), (255,) * 4),
    "grey and alpha": brush("LA", (255, 0), (255, 255)),
    "palette": palette(transparent=False),
    "palette with a transparent entry": reopened(palette(transparent=True)),
    "0 and 1": Image.fromarray(DRAWN.astype(np.uint8)),
    "0 and 1, 32 bits": Image.fromarray(DRAWN.astype(np.int32)),
    "0 and 255, 32 bits": Image.fromarray(DRAWN.astype(np.int32) * 255),
    "16 bits": reopened(Image.fromarray(DRAWN.astype(np.uint16) * 65535)),
    "float 0 to 1": Image.fromarray(DRAWN.astype(np.float32)),
    "float 0 to 255": Image.fromarray(DRAWN.astype(np.float32) * 255),
    "cmyk": brush("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)),
    "array of bool": DRAWN,
    "array of float": DRAWN.astype(np.float64),
    "array of 16 bits": DRAWN.astype(np.uint16) * 65535,
    "array in RGBA": np.array(brush("RGBA", (0, 0, 0, 0), (255, 0, 0, 255))),
    "array in RGB": np.array(brush("RGB", (0, 0, 0), (255, 255, 255))),
    "array of 0 and 1 in colours": np.repeat(DRAWN[..., None].astype(np.uint8), 3, -1),
    "array of grey and alpha": np.array(brush("LA", (255, 0), (255, 255))),
    "tensor": torch.from_numpy(DRAWN)[None].half(),
    "tensor of two axes": torch.from_numpy(DRAWN).to(torch.uint8),
    "tensor of colours ahead": torch.from_numpy(DRAWN)[None].expand(3, -1, -1).float(),
    "tensor of colours and alpha ahead": torch.from_numpy(
        np.array(brush("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)))
    ).permute(2, 0, 1),
    "a list of one": [DRAWN],
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_what_is_drawn_is_covered(name: str) -> None:
    (found,) = read_masks(DRAWINGS[name], DRAWN.shape, 1)
    assert np.array_equal(found.numpy(), DRAWN)


def test_black_beside_white_on_a_transparent_ground_stays() -> None:
    """A mask that was cut out of its ground, its own black opaque."""
    image = brush("RGBA", (0, 0, 0, 0), (255,) * 4)
    image.paste((0, 0, 0, 255), (0, 24, 48, 32))
    assert np.array_equal(read_masks(image, DRAWN.shape, 1)[0].numpy(), DRAWN)


def test_nothing_drawn_covers_nothing() -> None:
    for empty in (Image.new("L", (48, 32)), Image.new("RGBA", (48, 32)), np.zeros((32, 48)), torch.zeros(1, 32, 48)):
        assert not read_masks(empty, DRAWN.shape, 1).any()


def test_a_soft_edge_is_cut_at_half() -> None:
    ramp = np.linspace(0, 65535, 48).astype(np.uint16)[None].repeat(32, 0)
    assert read_masks(ramp, (32, 48), 1).float().mean() == 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_it_is_shown(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of what undoes each
    drawn = Image.fromarray(DRAWN)
    buffer = io.BytesIO()
    stored = drawn if orientation == 1 else drawn.transpose(Image.Transpose(back[orientation]))
    stored.save(buffer, "PNG", exif=exif)
    assert np.array_equal(read_masks(Image.open(buffer), DRAWN.shape, 1)[0].numpy(), DRAWN)


def test_a_drawing_that_is_too_dim_is_refused() -> None:
    """Numbers of classes, dark grey, faint probabilities: nothing of it is above half, and none may mean nothing."""
    for dim in (DRAWN.astype(np.uint8) * 2, Image.fromarray(DRAWN.astype(np.uint8) * 90), DRAWN * 0.4):
        with pytest.raises(MaskError, match="nothing in a mask is above half"):
            read_masks(dim, DRAWN.shape, 1)


def test_a_thin_stroke_outlives_shrinking() -> None:
    line = np.zeros((320, 480), dtype=np.uint8)
    line[161, 40:400] = 255
    found = read_masks(line, (32, 48), 1)[0]
    assert found[16, 4:40].all()
    assert int(found.sum()) == 36


class Large(Image.Image):
    """A picture that claims more pixels than are allowed."""

    size = (9_000, 9_000)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("mask.png", "cannot be read"),
        (None, "cannot be read"),
        (np.array([["a", "b"]]), "cannot be read"),
        (torch.zeros(32, 48, dtype=torch.complex64), "cannot be read"),
        (np.zeros((32, 48, 7)), "shape"),
        (np.zeros((0, 48)), "shape"),
        (np.full((32, 48), np.nan), "NaN"),
        (Large(), "9000 x 9000 pixels"),
        (np.zeros((48, 32)), "draw it on the image itself"),
    ],
)
def test_what_is_no_mask_is_named(given: Any, said: str) -> None:
    with pytest.raises(MaskError, match=said):
        read_masks(given, DRAWN.shape, 1)


def test_a_damaged_file_opened_lazily_is_named() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48), dtype=np.uint8)).save(buffer, "PNG")
    with pytest.raises(MaskError, match="cannot be read"):
        read_masks(Image.open(io.BytesIO(buffer.getvalue()[:600])), DRAWN.shape, 1)


# What is made of masks ----------------------------------------------------------------------------------------------


def test_masks_grow_as_far_as_the_blur_says() -> None:
    mask = torch.zeros(1, 200, 200, dtype=torch.bool)
    mask[:, :, :100] = True
    for kernel, pixels in ((1, 0), (7, 2), (13, 3), (77, 15)):
        # An edge grows by 1.28 sigma: 1.8, 2.9 and 15.3 pixels.
        assert int(grow(mask, kernel)[0, 100].sum()) - 100 == pytest.approx(pixels, abs=1)
        assert (grow(mask, kernel) | ~mask).all()


def test_latent_masks_cover_every_touched_pixel() -> None:
    mask = torch.zeros(1, 16, 24, dtype=torch.bool)
    mask[0, 7, 8] = True
    aligned = latent_aligned(mask, 8)
    assert aligned[0, :8, 8:16].all()
    assert int(aligned.sum()) == 64


def test_one_mask_serves_all_images_and_colours_do_not_matter() -> None:
    drawn = Image.new("RGB", (32, 32))
    drawn.paste("white", (8, 8, 16, 16))
    masks = read_masks(drawn, (32, 32), 3)
    assert masks.shape == (3, 32, 32)
    assert int(masks[0].sum()) == 64


def test_blending_keeps_the_mask_and_the_far_surroundings() -> None:
    source, made = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 20:40, 20:40] = True
    mixed = blend(source, made, mask, 2.0)
    assert (mixed[:, :, 20:40, 20:40] == 1).all()
    assert (mixed[:, :, :10] == 0).all()
    assert 0 < mixed[0, 0, 30, 41] < 1
