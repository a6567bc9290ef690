"""Reading of the pictures that pipelines take, without a change of their pixels, and padding to the models' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from erasure.errors import MaskError
from erasure.images import on_white, rgb

Picture = Image.Image | np.ndarray | Tensor
"""An image, an array `(height, width, 3)`, or a tensor `(3, height, width)` in 0-1."""
Pictures = Picture | Sequence[Picture]
"""One picture, several, or a batch as one array or tensor."""
CHANNELS = (1, 3, 4)
"""Allowed numbers of channels: grey, colours, colours with opacity."""
ROUNDING = 1e-3
"""Largest distance by which values in 0-1 may be out of range by rounding."""


def read_pixels(pictures: Pictures) -> Tensor:
    """Read pictures as `(batch, 3, height, width)` float32 in 0-1 on the CPU, as viewers show them.

    Args:
        pictures: One picture or several of one size: PIL images, turned as their EXIF data say; arrays
            `(height, width[, channels])` or tensors `([channels,] height, width)`, of whole numbers in 0-255 or 16
            bits, or of fractions in 0-1. Grey becomes three channels; what is transparent becomes white.

    Raises:
        MaskError: There is no picture, shapes or sizes do not fit, or values are NaN or out of range.
    """
    several = isinstance(pictures, (list, tuple)) or getattr(pictures, "ndim", 3) == 4
    batch = [_pixels(picture) for picture in (cast(Sequence[Picture], pictures) if several else [pictures])]
    if not batch:
        raise MaskError("no image was given: pass one or several images")
    sizes = {tuple(pixels.shape[1:]) for pixels in batch}
    if len(sizes) != 1:
        raise MaskError(f"images of {len(sizes)} sizes: call the pipeline once for each size")
    return torch.stack(batch)


def _pixels(picture: object) -> Tensor:
    """Read one picture as `(3, height, width)` in 0-1."""
    if isinstance(picture, Image.Image):
        picture = np.array(rgb(picture, "an image", error=MaskError))
    if not isinstance(picture, (np.ndarray, Tensor)):
        raise MaskError(
            f"an image is a {type(picture).__name__}: give a PIL image, an array or a tensor, or a list of those"
        )
    is_array = isinstance(picture, np.ndarray)
    try:
        values = torch.from_numpy(np.array(picture)) if is_array else cast(Tensor, picture).detach().cpu()
    except TypeError as reason:
        raise MaskError(f"an image of {cast(np.ndarray, picture).dtype} values: give numbers") from reason
    values = values[None] if values.ndim == 2 else values
    if values.ndim == 3 and values.shape[2] in CHANNELS and (is_array or values.shape[0] not in CHANNELS):
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or values.shape[0] not in CHANNELS or not values.numel() or values.is_complex():
        raise MaskError(
            f"an image has the shape {tuple(values.shape)} and {values.dtype} values; wanted: numbers of (height, "
            "width, 3) as an array, or (3, height, width) as a tensor"
        )
    values = _in_range(values)
    if values.shape[0] == 4:
        quantised = (255 * values).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return _pixels(on_white(Image.fromarray(quantised), "an image"))
    return values.expand(3, -1, -1)


def _in_range(values: Tensor) -> Tensor:
    """Check that an image's values are in 0-1, and give them as float32.

    Raises:
        MaskError: They are not finite, or out of range.
    """
    whole = not values.is_floating_point()
    most = 1 if values.dtype == torch.bool or not whole else 65535 if values.dtype == torch.uint16 else 255
    found = values.float()
    if not torch.isfinite(found).all():
        raise MaskError("the image holds NaN or infinity: check how it was made")
    if found.min() < -ROUNDING * most or found.max() > (1 + ROUNDING) * most:
        raise MaskError(
            f"the image holds values from {float(found.min()):.3g} to {float(found.max()):.3g}; allowed: 0 to {most} "
            f"for {values.dtype}. Bring -1 to 1 to 0 to 1 with image / 2 + 0.5"
        )
    return (found / most).clamp(0, 1)


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pixels in 0-1 to a height and width, bicubic and antialiased; pixels of this size do not change."""
    if tuple(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def padded(pixels: Tensor, side: int) -> Tensor:
    """Pad pixels `(batch, channels, height, width)` to the right and downwards to multiples of `side`.

    The padding repeats the last row and column, so nothing is stretched, and `cropped` removes it again.
    """
    height, width = pixels.shape[2:]
    return F.pad(pixels, (0, -width % side, 0, -height % side), mode="replicate")


def cropped(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the upper left part `(..., height, width)` of a size, which undoes `padded`."""
    return pixels[..., : size[0], : size[1]]
