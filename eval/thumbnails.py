"""Small pictures for pages: a thumbnail, and the mosaic that stands for a picture nobody should meet unasked."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from erasure.errors import EvaluationError
from erasure.files import read_bytes
from erasure.images import read_rgb
from erasure.shown import visible

SIDE = 192
"""Pixels on the longer side of a thumbnail, at most."""
EXACT = 64
"""Pictures with a longer side of at most so many pixels are kept as they are, without loss."""
QUALITY = 80
"""Of WebP."""
MOSAIC = 16
"""Pixels on the longer side of a mosaic, at most."""
LARGEST = 16_000_000
"""Bytes of a picture that is read."""
PNG = b"\x89PNG\r\n\x1a\n"
"""How every PNG file begins."""


def read_picture(path: Path) -> Image.Image | None:
    """Read the picture of a sample; `None` when there is none.

    Raises:
        EvaluationError: It is no PNG, damaged, or very large.
    """
    if not os.path.lexists(path):
        return None
    if not bytes(read_bytes(path, LARGEST, error=EvaluationError)).startswith(PNG):
        raise EvaluationError(f"{visible(path, 200)} is no PNG: delete it, pages go without; or give another folder")
    return read_rgb(path, formats=("PNG",), error=EvaluationError)


def thumbnail(image: Image.Image) -> bytes:
    """Make a WebP thumbnail with at most `SIDE` pixels on its longer side."""
    lossless = max(image.size) <= EXACT
    return _webp(_within(image, SIDE), lossless=lossless)


def mosaic(image: Image.Image) -> bytes:
    """Make a WebP mosaic with at most `MOSAIC` cells on its longer side, each the mean of its area."""
    return _webp(_within(image, MOSAIC), lossless=True)


def _within(image: Image.Image, side: int) -> Image.Image:
    longer = max(image.size)
    if longer <= side:
        return image
    size = tuple(max(1, round(each * side / longer)) for each in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


def _webp(image: Image.Image, *, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=QUALITY, lossless=lossless, method=4)
    return buffer.getvalue()
