"""Pictures of every kind that users hand to pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.errors import MaskError
from erasure.pipelines.pictures import cropped, padded, read_pixels, resized

COLOURS = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)
WANTED = torch.from_numpy(COLOURS).permute(2, 0, 1)[None] / 255
GREY = np.random.default_rng(1).integers(0, 255, (12, 10), dtype=np.uint8)
WANTED_GREY = torch.from_numpy(GREY).expand(1, 3, -1, -1) / 255

SAME: dict[str, tuple[Any, torch.Tensor]] = {
    "PIL": (Image.fromarray(COLOURS), WANTED),
    "array": (COLOURS, WANTED),
    "array with opacity": (np.dstack([COLOURS, np.full((12, 10), 255, np.uint8)]), WANTED),
    "array of fractions": (COLOURS.astype(np.float64) / 255, WANTED),
    "array of large integers": (COLOURS.astype(np.int64), WANTED),
    "array of 16 bits": (COLOURS.astype(np.uint16) * 257, WANTED),
    "batch of arrays": (COLOURS[None], WANTED),
    "tensor": (torch.from_numpy(COLOURS).permute(2, 0, 1), WANTED),
    "tensor with channels behind": (torch.from_numpy(COLOURS), WANTED),
    "list of one": ([Image.fromarray(COLOURS)], WANTED),
    "grey PIL": (Image.fromarray(GREY), WANTED_GREY),
    "grey 16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), WANTED_GREY),
    "grey array": (GREY, WANTED_GREY),
    "grey array with a channel": (GREY[..., None], WANTED_GREY),
    "grey tensor": (torch.from_numpy(GREY), WANTED_GREY),
    "grey with opacity": (Image.fromarray(GREY).convert("LA"), WANTED_GREY),
    "bilevel": (Image.fromarray(GREY > 127), (torch.from_numpy(GREY) > 127).expand(1, 3, -1, -1).float()),
    "bool": (GREY > 127, (torch.from_numpy(GREY) > 127).expand(1, 3, -1, -1).float()),
    "cmyk": (Image.fromarray(COLOURS).convert("CMYK"), WANTED),
    "palette": (Image.fromarray(GREY).convert("P"), WANTED_GREY),
}


@pytest.mark.parametrize("name", SAME)
def test_a_picture_is_what_is_seen(name: str) -> None:
    given, wanted = SAME[name]
    found = read_pixels(given)
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-6


def test_a_photograph_is_upright() -> None:
    image = Image.fromarray(COLOURS).transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    assert torch.equal(read_pixels(image), WANTED)


def test_transparency_is_white() -> None:
    clear = np.dstack([COLOURS, np.zeros((12, 10), np.uint8)])
    for given in (clear, Image.fromarray(clear), torch.from_numpy(clear).permute(2, 0, 1) / 255):
        with pytest.warns(UserWarning, match="transparent"):
            assert (read_pixels(given) == 1).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("photo.png", "is a str"),
        (None, "is a NoneType"),
        ([], "no image"),
        ([COLOURS, COLOURS[:5]], "2 sizes"),
        (np.array([["a"]]), "give numbers"),
        (np.zeros((12, 10, 7)), "shape"),
        (np.zeros((0, 10, 3)), "shape"),
        (torch.zeros(2, 3, dtype=torch.complex64), "shape"),
        (np.full((12, 10, 3), np.nan), "NaN"),
        (COLOURS.astype(np.float32), "0 to 1"),
        (2 * WANTED - 1, "image / 2"),
        (COLOURS.astype(np.int32) * 9, "0 to 255"),
        (Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "range is not known"),
    ],
)
def test_what_is_no_picture_is_named(given: Any, said: str) -> None:
    with pytest.raises(MaskError, match=said):
        read_pixels(given)


def test_continuing_repeats_the_edge_and_is_undone() -> None:
    large = padded(WANTED, 8)
    assert large.shape == (1, 3, 16, 16)
    assert torch.equal(cropped(large, (12, 10)), WANTED)
    assert torch.equal(large[..., :12, 15], WANTED[..., 9])
    assert resized(WANTED, (12, 10)) is WANTED
    assert resized(WANTED, (20, 30)).shape == (1, 3, 20, 30)
