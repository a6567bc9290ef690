"""Reading and checking of training pictures, and scaling to the model's size."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone
from erasure.errors import ImageError, MaskError
from erasure.images import flaw, read_image, rgb, upright
from erasure.masks import read_masks

LEAST_SIDE = 4
"""Largest factor by which a picture's sides are enlarged to the model's size."""
SMALLEST_SHARE, LARGEST_SHARE = 0.005, 0.98
"""Smallest and largest share of a picture that a thing covers."""
FRAME = 1.15
"""Side of the square around a cut-out thing, relative to the thing's longer side."""
SAME = 0.8
"""Intersection over union above which two masks are of the same thing."""


class Pictures(NamedTuple):
    """Pictures at the model's size."""

    pixels: Tensor
    """Pixels, `(pictures, 3, height, width)` in 0-1."""
    inside: Tensor
    """Mask of the pictures themselves without padding, `(pictures, 1, height, width)`, 0 or 1."""
    opaque: Tensor
    """Mask of what is not transparent, `(pictures, 1, height, width)`, 0 or 1."""
    masks: Tensor | None
    """The user's masks, if any, `(pictures, tokens, height, width)`, 0 or 1."""


def read_pictures(
    given: Sequence[str | Path | Image.Image], masks: Sequence[Sequence[str | Path | Image.Image]], tokens: int,
    size: tuple[int, int],
) -> Pictures:  # fmt: skip
    """Read pictures, each of which shows all things to learn.

    They are scaled to fit the model's size, and padded by the colour of their edge where proportions differ.

    Args:
        given: Files or pictures.
        masks: For each picture the masks of the tokens, in their order; empty where the model is to find them.
        tokens: Number of things to learn.
        size: Height and width in pixels of the model's images.

    Raises:
        ImageError: A picture cannot be read, is blank, or is too small.
        MaskError: The numbers of masks, pictures and tokens differ, a mask is empty, covers everything or does not fit
            its picture, or two masks are the same.
    """
    if not given:
        raise ImageError("no picture is given: name at least one that shows what is to be learned")
    if masks and [len(each) for each in masks] != [tokens] * len(given):
        raise MaskError(
            f"{len(given)} pictures of {tokens} things have {[len(each) for each in masks]} masks: give each picture "
            "one mask for each token, in their order, or none at all"
        )
    parts = [_read(picture, f"picture {number}", size) for number, picture in enumerate(given)]
    drawn = None
    if masks:
        drawn = torch.stack([_placed(own, part, size) for own, part in zip(masks, parts, strict=True)])
        check_masks(drawn.bool(), "a mask that was given")
    pixels, inside, opaque, _ = zip(*parts, strict=True)
    return Pictures(torch.stack(pixels), torch.stack(inside), torch.stack(opaque), drawn)


def check_masks(masks: Tensor, what: str) -> None:
    """Refuse masks from which things cannot be learned, or not separately.

    Args:
        masks: `(pictures, tokens, height, width)` bool.
        what: Description of the masks, for messages.

    Raises:
        MaskError: A mask covers nothing or everything, or two masks of a picture are the same.
    """
    for row, picture in enumerate(masks):
        for column, mask in enumerate(picture):
            share = float(mask.float().mean())
            if not SMALLEST_SHARE <= share <= LARGEST_SHARE:
                raise MaskError(
                    f"{what} of thing {column + 1} covers {share:.1%} of picture {row}; wanted: {SMALLEST_SHARE:.1%} "
                    f"to {LARGEST_SHARE:.0%}. Draw it around the thing alone, or take a picture in which the thing is "
                    "larger and stands before a background"
                )
        for first in range(len(picture)):
            for second in range(first):
                both = (picture[first] & picture[second]).sum() / (picture[first] | picture[second]).sum()
                if both >= SAME:
                    raise MaskError(
                        f"{what} of thing {second + 1} and that of thing {first + 1} cover the same place of picture "
                        f"{row} ({both:.0%} of both), so they cannot be told apart: mask each thing alone, or learn "
                        "them as one token"
                    )


def _read(
    given: str | Path | Image.Image, where: str, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Read a picture: pixels, mask without padding, mask of opaque parts, and the picture's own height and width."""
    if not isinstance(given, Image.Image):
        where, given = str(given), read_image(given)
    if (reason := flaw(given)) is not None:
        raise ImageError(f"{where} is {reason}: there is nothing to learn in it; give a picture that shows the thing")
    given = upright(given)
    wanted = [-(-side // LEAST_SIDE) for side in size]
    if given.height < wanted[0] or given.width < wanted[1]:
        raise ImageError(
            f"{where} has {given.width} x {given.height} pixels, and the model draws {size[1]} x {size[0]}: give one "
            f"of {wanted[1]} x {wanted[0]} at least"
        )
    alpha = given.convert("RGBA").getchannel("A") if given.has_transparency_data else None
    with warnings.catch_warnings():
        # Transparent parts are background here.
        warnings.simplefilter("ignore")
        colours = _values(rgb(given, where))
    solid = torch.ones_like(colours[:1]) if alpha is None else (_values(alpha) > 0.5).float()
    edge = torch.cat([colours[:, 0], colours[:, -1], colours[:, :, 0], colours[:, :, -1]], 1).median(1).values
    pixels = fitted(colours, size, edge[:, None, None])
    inside = fitted(torch.ones_like(solid), size, torch.zeros(1, 1, 1))
    return (
        pixels,
        (inside > 0.5).float(),
        (fitted(solid, size, torch.zeros(1, 1, 1)) > 0.5).float(),
        (given.height, given.width),
    )


def fitted(values: Tensor, size: tuple[int, int], filling: Tensor) -> Tensor:
    """Scale channels `(channels, height, width)` in 0-1 to fit into a size, and pad around them."""
    factor = min(size[0] / values.shape[1], size[1] / values.shape[2])
    rows, columns = (
        max(1, min(round(factor * side), most)) for side, most in zip(values.shape[1:], size, strict=True)
    )
    if (rows, columns) != tuple(values.shape[1:]):
        values = F.interpolate(values[None], (rows, columns), mode="bicubic", antialias=True)[0].clamp(0, 1)
    whole = filling.expand(len(values), *size).clone()
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    whole[:, top : top + rows, left : left + columns] = values
    return whole


def cut_out(pixels: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Cut out each thing of a picture, as large as fits, on the most frequent colour of its background.

    Args:
        pixels: `(3, height, width)` in 0-1.
        masks: `(tokens, height, width)` bool.

    Returns:
        Pixels `(tokens, 3, height, width)` and masks of the same size, 0 or 1.
    """
    size = (pixels.shape[1], pixels.shape[2])
    background = ~masks.any(0)
    behind = (pixels[:, background] if background.any() else pixels.flatten(1)).median(1).values[:, None, None]
    made = []
    for own in masks:
        rows, columns = own.any(1).nonzero()[:, 0], own.any(0).nonzero()[:, 0]
        top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
        side = round(FRAME * max(bottom - top, right - left))
        place = (slice(top, bottom), slice(left, right))
        thing = torch.where(masks[:, *place].any(0) & ~own[place], behind, pixels[:, *place])
        y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
        whole, mask = behind.expand(-1, side, side).clone(), torch.zeros(1, side, side)
        whole[:, y : y + bottom - top, x : x + right - left] = thing
        mask[0, y : y + bottom - top, x : x + right - left] = own[place].float()
        made.append((fitted(whole, size, behind), (fitted(mask, size, torch.zeros(1, 1, 1))[0] > 0.5).float()))
    return torch.stack([thing for thing, _ in made]), torch.stack([mask for _, mask in made])


def _placed(
    masks: Sequence[str | Path | Image.Image], part: tuple[Tensor, Tensor, Tensor, tuple[int, int]],
    size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Place a picture's masks as the picture, `(tokens, height, width)`, 0 or 1."""
    drawn = [mask if isinstance(mask, Image.Image) else read_image(mask, error=MaskError) for mask in masks]
    found = [read_masks(mask, part[3], 1).float() for mask in drawn]
    return torch.cat([(fitted(mask, size, torch.zeros(1, 1, 1)) > 0.5).float() for mask in found])


def _values(image: Image.Image) -> Tensor:
    """Give pixels, `(channels, height, width)` in 0-1."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@torch.no_grad()
def encoded(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Encode pixels in 0-1 as latents `(pictures, channels, h, w)` on the denoiser's device: the posterior's mode."""
    vae = backbone.pipe.vae
    before = vae.dtype
    if before == torch.float16 and vae.config.get("force_upcast"):
        vae.to(torch.float32)
    try:
        given = (2 * pixels - 1).to(next(vae.parameters()).device, vae.dtype)
        return backbone.latents.from_vae(vae.encode(given).latent_dist.mode()).to(backbone.device, backbone.dtype)
    finally:
        vae.to(before)
