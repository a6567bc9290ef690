"""Reading pictures: kind of file, format, size and number of frames are checked before a pixel is decoded."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from erasure.errors import ErasureError, ImageError
from erasure.files import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are read. Others call programs (EPS), or hold no pixels (WMF)."""
BYTES_LIMIT = 256 * 2**20
"""Bytes of a file."""
PIXELS_LIMIT = 64 * 2**20
"""Pixels of a picture: 8192 x 8192."""


def read_image(
    path: str | Path, *, formats: tuple[str, ...] = FORMATS, limit: int = PIXELS_LIMIT,
    error: type[ErasureError] = ImageError,
) -> Image.Image:  # fmt: skip
    """A picture in the mode of its file, decoded, as viewers show it: turned as its EXIF data say.

    Args:
        path: The file; links are followed.
        formats: Formats that it may have, by Pillow's names.
        limit: Most pixels.
        error: What is raised.

    Raises:
        ErasureError: It is missing, no regular file, no picture, of another format, animated, too large, or damaged.
    """
    content = bytes(read_bytes(path, BYTES_LIMIT, error=error))
    allowed = " or ".join(formats)
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            check_size(image, str(path), limit, error=error)
            check_single(image, str(path), error=error)
            image.verify()
        with Image.open(io.BytesIO(content), formats=formats) as image:
            image.load()
            return upright(image)
    except ErasureError:
        raise
    except Image.UnidentifiedImageError as reason:
        raise error(f"{path} cannot be read: it is no picture in {allowed}; convert it") from reason
    except Image.DecompressionBombError as reason:
        raise error(
            f"{path} cannot be read ({reason}): at most {limit:,} pixels are allowed; scale it down"
        ) from reason
    except Exception as reason:  # decoders meet damaged files in many ways
        raise error(
            f"{path} cannot be read as a picture ({type(reason).__name__}: {reason}): it is damaged; export it again"
        ) from reason


def read_rgb(
    path: str | Path, *, formats: tuple[str, ...] = FORMATS, error: type[ErasureError] = ImageError
) -> Image.Image:
    """A picture in RGB; see `read_image` and `rgb`."""
    return rgb(read_image(path, formats=formats, error=error), str(path), error=error)


def rgb(image: Image.Image, where: str = "an image", *, error: type[ErasureError] = ImageError) -> Image.Image:
    """A picture in RGB as viewers show it: turned as its EXIF data say, and on white where it is transparent.

    Sixteen bits become eight; Pillow itself would cut all above 255 off.

    Args:
        image: The picture, decoded or still in its file.
        where: Its place, for messages.
        error: What is raised.

    Raises:
        ErasureError: It is too large, animated, damaged, or its values have no known range.
    """
    check_size(image, where, error=error)
    check_single(image, where, error=error)
    if image.mode in ("I", "F"):
        raise error(f"{where} has the mode {image.mode!r}, whose range is not known: save it with 8 or 16 bits")
    try:
        image = upright(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
        return on_white(image.convert("RGBA"), where) if image.has_transparency_data else image.convert("RGB")
    except Exception as reason:  # decoders meet damaged files in many ways
        raise error(f"{where} cannot be decoded ({type(reason).__name__}: {reason}): save it again") from reason


def upright(image: Image.Image) -> Image.Image:
    """A copy of a picture, turned and mirrored as its EXIF data say, which no longer say so."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        # Damaged data beside sound pixels: viewers show those as they are stored.
        return image.copy()


def on_white(image: Image.Image, where: str) -> Image.Image:
    """A picture in RGBA on a white ground, in RGB. Warns where that can be seen: colours behind it are not shown."""
    if image.getextrema()[3][0] < 255:
        warnings.warn(f"{where} is transparent in places: they are taken as white", stacklevel=3)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_single(image: Image.Image, where: str, *, error: type[ErasureError] = ImageError) -> None:
    """Refuse a picture that is an animation or a stack of pages.

    Raises:
        ErasureError: It holds several pictures.
    """
    # What phones write as MPO is a photograph with further ones behind it, no animation.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise error(f"{where} holds several pictures: give a file with one")


def check_size(
    image: Image.Image, where: str, limit: int = PIXELS_LIMIT, *, error: type[ErasureError] = ImageError
) -> None:
    """Refuse a picture without pixels or with too many; nothing is decoded.

    Raises:
        ErasureError: It has none, or more than the limit.
    """
    width, height = image.size
    if not 0 < width * height <= limit:
        raise error(f"{where} has {width} x {height} pixels; allowed: 1 to {limit:,}. Scale it")


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file in RGB."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
