"""Masks of the parts to remove from images: reading, growing, alignment to the latent grid, blending."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from erasure.errors import MaskError
from erasure.images import check_single, check_size, upright

GROWN = 0.1
"""Value of a blurred mask above which a pixel belongs to the grown mask (Attentive Eraser's code)."""
OVERLAY = 140
"""Opacity of a mask that is shown over an image, of 255."""
CHANNELS = (1, 2, 3, 4)
"""Allowed numbers of channels of a mask: grey or colours, with or without opacity."""
COLOURLESS = 0.25
"""Largest difference of the channels of a grey pixel, in 0-1; JPEG does not keep grey exactly."""


def read_masks(given: object, size: tuple[int, int], count: int) -> Tensor:
    """Read masks as `(count, height, width)` bool.

    Args:
        given: One mask or several: PIL images, arrays or tensors, of `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`, where values above half of the type's maximum (1, 255 or 65535) mark pixels to
            remove. Strokes in any colour on black, or on a transparent background, mark pixels too. PIL images are
            turned as their EXIF data say. A batch may be one tensor or array.
        size: Height and width of the images as they are shown; masks of the same shape at another size are resized.
        count: Number of images; a single mask is used for all.

    Raises:
        MaskError: The numbers of masks and images differ, a shape does not fit, a picture cannot be read, a drawing is
            too dim, or there is no mask.
    """
    batch = _each(given, count)
    if len(batch) not in (1, count):
        raise MaskError(f"{len(batch)} masks for {count} images: give one mask for all, or one for each")
    masks = torch.stack([_read(mask, size) for mask in batch])
    return masks.expand(count, -1, -1) if len(masks) < count else masks


def _each(given: object, count: int) -> Sequence[object]:
    """Split a batch into single masks."""
    if not isinstance(given, (Tensor, np.ndarray)):
        return list(given) if isinstance(given, (list, tuple)) else [given]
    is_one = given.ndim < 3 or (given.ndim == 3 and (given.shape[0] != count or _is_coloured(given.shape)))
    return [given] if is_one else list(given)


def _is_coloured(shape: Sequence[int]) -> bool:
    """Whether three axes are those of one mask with channels last, and not of several masks."""
    return shape[2] in CHANNELS and shape[1] not in CHANNELS


def _read(mask: object, size: tuple[int, int]) -> Tensor:
    values = _strokes(_values(mask))
    if 0 < (most := float(values.max())) <= 0.5:
        raise MaskError(
            f"nothing in a mask is above half: its greatest value is {most:.3g} of 1. Paint what is to be removed in "
            "white, or scale the values"
        )
    (height, width), (rows, columns) = size, values.shape
    # A difference of one pixel by rounding is allowed.
    if abs(rows / columns - height / width) > 0.1 * height / width:
        raise MaskError(
            f"a mask of {columns}x{rows} pixels for an image of {width}x{height}: draw it on the image itself, as it "
            "is shown with its EXIF orientation"
        )
    return fitted(values[None], size)[0]


def fitted(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks `(count, height, width)`, bool or values in 0-1, to a height and width, as bool."""
    rows, columns = masks.shape[1:]
    if (rows, columns) == size:
        return masks > 0.5
    if rows > size[0] or columns > size[1]:
        # A thin stroke must not fall between the pixels of the smaller mask.
        return F.adaptive_max_pool2d((masks > 0.5).float()[:, None], size)[:, 0] > 0
    return F.interpolate(masks.float()[:, None], size, mode="bilinear", align_corners=False)[:, 0] > 0.5


def _values(mask: object) -> Tensor:
    """Read the values of a mask as float32, `(height, width, channels)`.

    Raises:
        MaskError: The object is not a picture or an array of numbers, has another shape, is empty, or has values that
            are not finite.
    """
    try:
        if isinstance(mask, Image.Image):
            check_size(mask, "a mask", error=MaskError)
            check_single(mask, "a mask", error=MaskError)
            mask = np.array(_plain(upright(mask)))
        values = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
        if values.is_complex():
            raise TypeError("complex numbers")
        values = values.detach().cpu().float()
    except MaskError:
        raise
    except Exception as error:  # Pillow opens lazily, and a damaged file fails here in many ways
        raise MaskError(
            f"a mask that cannot be read ({type(error).__name__}: {error}): give a picture, or an array or tensor of "
            "numbers"
        ) from error
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim == 3 and values.shape[0] in CHANNELS and values.shape[2] not in CHANNELS:
        values = values.permute(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in CHANNELS or not values.numel() or not values.isfinite().all():
        raise MaskError(
            f"a mask has the shape {tuple(values.shape)}, or NaN in it; wanted: finite (height, width), or one to "
            "four channels ahead or behind"
        )
    return values


def _plain(picture: Image.Image) -> Image.Image:
    """Convert a picture to a mode whose values are brightness, with its transparency if it has any."""
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    if picture.mode in ("1", "P"):
        return picture.convert("RGB")
    return picture if picture.mode in ("L", "RGB", "F") or picture.mode.startswith("I") else picture.convert("RGB")


def _strokes(values: Tensor) -> Tensor:
    """Find the drawn parts of a mask, in 0-1: `(height, width, channels)` -> `(height, width)`.

    With two or four channels the last one is opacity. If opacity varies within the mask, every visible pixel counts as
    drawn; black and dark grey do not, unless nothing else is there.
    """
    has_opacity = values.shape[-1] in (2, 4)
    colours = _scaled(values[..., :-1] if has_opacity else values)
    # This is the maximum of the channels, not luminance, in which pure red and blue are dark.
    bright = colours.amax(-1)
    bright = bright.masked_fill(bright - colours.amin(-1) > COLOURLESS, 1.0)
    if not has_opacity:
        return bright
    opacity = values[..., -1]
    seen = opacity / opacity.max().clamp(min=1e-12)
    if opacity.min() == opacity.max() > 0:
        return bright
    dark = bright <= 0.5
    return seen if dark[seen > 0.5].all() else seen * ~dark


def _scaled(values: Tensor) -> Tensor:
    """Scale values of 0-1, 0-255 or 0-65535 to 0-1; the largest value decides which."""
    most = float(values.max())
    return values / (1 if most <= 1 else 255 if most <= 255 else 65535)


def laid_over(image: Image.Image, mask: Tensor) -> Image.Image:
    """Show a mask `(height, width)` bool in red over an image, in RGB."""
    covered = Image.fromarray(mask.cpu().numpy()).convert("L").point([0] * 255 + [OVERLAY])
    return Image.composite(Image.new("RGB", image.size, "red"), image.convert("RGB"), covered)


def grow(masks: Tensor, kernel: int) -> Tensor:
    """Grow masks as Attentive Eraser does: blur them, and keep everything above a tenth.

    Args:
        masks: Masks, `(batch, height, width)` bool.
        kernel: Side of the Gaussian in pixels, odd; its sigma is `0.3 ((kernel - 1) / 2 - 1) + 0.8`, and edges grow by
            1.28 sigma. 0 or 1 leaves masks as they are.
    """
    if kernel <= 1:
        return masks
    side = min(kernel, 2 * min(masks.shape[1:]) - 1)  # reflection cannot reach farther
    return masks | (gaussian_blur(masks.float(), [side, side]) >= GROWN)


def latent_aligned(masks: Tensor, factor: int) -> Tensor:
    """Mark all pixels of each latent pixel that a mask touches, `(batch, height, width)` bool in the image's size."""
    touched = F.max_pool2d(masks.float()[:, None], factor)
    return F.interpolate(touched, scale_factor=factor)[:, 0] > 0


def blend(source: Tensor, made: Tensor, masks: Tensor, radius: float) -> Tensor:
    """Put the source back outside of the masks, with a soft edge (Attentive Eraser's figures: radius 15).

    Args:
        source: Original images, `(batch, 3, height, width)` in 0-1.
        made: Changed images, `(batch, 3, height, width)` in 0-1.
        masks: Masks, `(batch, height, width)` bool.
        radius: Radius of the Gaussian that softens the edge, in pixels. Inside of the mask no pixel comes from the
            source.
    """
    soft = []
    for mask in masks.cpu():
        picture = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255
        soft.append(torch.maximum(mask.float(), torch.from_numpy(blurred)))
    share = torch.stack(soft)[:, None].to(made)
    return share * made + (1 - share) * source.to(made)
