"""What a brush has painted, as a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from erasure.errors import MaskError
from erasure.masks import laid_over, read_masks

OPAQUE = 127
"""Opacity above which a stroke counts, out of 255."""


def painted(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """The strokes of all layers as a mask, white where something is to be removed.

    Args:
        layers: Strokes in any colour on transparency.
        size: Width and height of the picture.

    Returns:
        The mask, or `None` where nothing is painted.

    Raises:
        MaskError: A layer has another size than the picture, or no transparency.
    """
    covered = np.zeros((size[1], size[0]), bool)
    for layer in layers:
        if layer.size != size:
            raise MaskError(
                f"the strokes have {layer.width}x{layer.height} pixels and the picture {size[0]}x{size[1]}: "
                "put the picture in again, and paint on it"
            )
        if "A" not in layer.getbands():
            raise MaskError(f"strokes have no transparency (mode {layer.mode}): paint on a layer above the picture")
        covered |= np.asarray(layer.getchannel("A")) > OPAQUE
    return Image.fromarray(covered).convert("L") if covered.any() else None


def overlaid(image: Image.Image, mask: Image.Image, shadow: bool) -> Image.Image:
    """A picture with the mask over it in red.

    Args:
        image: The picture, RGB.
        mask: White where something was removed.
        shadow: Whether the mask is grown into shadows, as removal does it.
    """
    (used,) = read_masks(mask, (image.height, image.width), 1)
    if shadow:
        from erasure.pipelines.pictures import read_pixels
        from erasure.pipelines.shadows import with_shadows

        (used,) = with_shadows(used[None], read_pixels(image))
    return laid_over(image, used)
