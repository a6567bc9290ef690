"""Masks of what to take out of images: reading, growing, laying over the latent grid, blending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from erasure.errors import MaskError

GROWN = 0.1
"""What a blurred mask must reach for a pixel to belong to the grown one (Attentive Eraser's code)."""


def read_masks(given: Any, size: tuple[int, int], count: int) -> Tensor:
    """Masks as `(count, height, width)` bool.

    Args:
        given: One mask or several: PIL images, arrays or tensors, of `(height, width)` or `(1, height, width)`, where
            more than half of the greatest value means: take out. A batch may be one tensor or array.
        size: Height and width of the images; masks of the same shape at another size are resized.
        count: Number of images; a single mask serves them all.

    Raises:
        MaskError: Another number of masks than of images, another shape, or no mask at all.
    """
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim > 2:
        batch: Sequence[Any] = list(given) if given.ndim == 4 or given.shape[0] == count else [given]
    else:
        batch = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(batch) not in (1, count):
        raise MaskError(f"{len(batch)} masks for {count} images: give one mask for all, or one for each")
    masks = torch.stack([_read(mask, size) for mask in batch])
    return masks.expand(count, -1, -1) if len(masks) < count else masks


def _read(mask: Any, size: tuple[int, int]) -> Tensor:
    if isinstance(mask, Image.Image):
        values = torch.from_numpy(np.array(mask.convert("L"))).float() / 255
    else:
        values = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
        values = values.detach().float().cpu()
        values = values.squeeze(0) if values.ndim == 3 and values.shape[0] == 1 else values
        values = values.mean(-1) if values.ndim == 3 and values.shape[-1] == 3 else values
        if values.ndim != 2 or not torch.isfinite(values).all():
            raise MaskError(
                f"a mask has the shape {tuple(values.shape)}, or NaN in it; wanted: finite (height, width)"
            )
        values = values / 255 if values.max() > 1 else values
    if tuple(values.shape) != size:
        (height, width), (rows, columns) = size, values.shape
        # One pixel of rounding is nobody's mistake: images are cut to multiples of the VAE's factor.
        if abs(rows / columns - height / width) > 0.1 * height / width:
            raise MaskError(
                f"a mask of {columns}x{rows} pixels for an image of {width}x{height}: draw it on the image itself"
            )
        values = F.interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return values > 0.5


def grow(masks: Tensor, kernel: int) -> Tensor:
    """Masks grown as Attentive Eraser does: blurred, then everything above a tenth.

    Args:
        masks: `(batch, height, width)` bool.
        kernel: Side of the Gaussian in pixels, odd; its sigma is `0.3 ((kernel - 1) / 2 - 1) + 0.8`, and edges grow by
            1.28 sigma. 0 or 1 leaves masks as they are.
    """
    if kernel <= 1:
        return masks
    side = min(kernel, 2 * min(masks.shape[1:]) - 1)  # reflection cannot reach farther
    return masks | (gaussian_blur(masks.float(), [side, side]) >= GROWN)


def latent_aligned(masks: Tensor, factor: int) -> Tensor:
    """Every latent pixel that a mask touches, at the size of the image: `(batch, height, width)` bool."""
    touched = F.max_pool2d(masks.float()[:, None], factor)
    return F.interpolate(touched, scale_factor=factor)[:, 0] > 0


def blend(source: Tensor, made: Tensor, masks: Tensor, radius: float) -> Tensor:
    """Put the source back outside of the masks, with a soft edge (Attentive Eraser's figures: radius 15).

    Args:
        source: `(batch, 3, height, width)` in 0-1.
        made: The same.
        masks: `(batch, height, width)` bool.
        radius: Of the Gaussian that softens the edge, in pixels; within the mask nothing of the source comes back.
    """
    soft = []
    for mask in masks.cpu():
        picture = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255
        soft.append(torch.maximum(mask.float(), torch.from_numpy(blurred)))
    share = torch.stack(soft)[:, None].to(made)
    return share * made + (1 - share) * source.to(made)
