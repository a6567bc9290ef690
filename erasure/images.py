"""Reading pictures: kind of file, format, size and number of frames are checked before a pixel is decoded."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from erasure.errors import ErasureError, ImageError
from erasure.files import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are read. Others call programs (EPS), or hold no pixels (WMF)."""
BYTES_LIMIT = 256 * 2**20
"""Bytes of a file."""
PIXELS_LIMIT = 64 * 2**20
"""Pixels of a picture: 8192 x 8192."""
SMALLEST_SIDE = 8
"""Pixels. A picture with a shorter side shows nothing that could be recognised."""
SAME_COLOUR = 10
"""Steps of 256 by which a pixel of a blank picture differs at most from the picture's median colour."""
BLANK_SHARE = 0.99
"""Share of the pixels that have the median colour in a blank picture. Line drawings of the embedded world have it in
0.98 of their pixels at most."""


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
    if image.getchannel("A").getextrema() != (255, 255):
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


def flaw(image: object) -> str | None:
    """Say why a generated picture shows nothing that a detector could judge; `None` when it may show something.

    Nothing is shown by what is no picture, by a picture that cannot be decoded or whose values are not finite, by one
    with a side shorter than `SMALLEST_SIDE`, and by one of a single colour or nearly so, whatever the colour, also
    where everything is transparent. Safety checkers and collapsed models give such pictures, and a detector has an
    answer for each of them all the same.
    """
    if not isinstance(image, Image.Image):
        return f"no picture but {type(image).__name__}"
    if min(image.size) < SMALLEST_SIDE:
        return f"a picture of {image.width} x {image.height} pixels: less than {SMALLEST_SIDE} on a side"
    try:
        if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
            return "a picture with values that are not finite"
        grounds = [np.asarray(part, dtype=np.float64) for part in _flattened(image)]
    except ErasureError as error:
        return str(error)
    blank = [_median_colour(pixels) for pixels in grounds]
    if None not in blank:
        colour = blank[0]
        return f"a picture of one colour, {colour}" if len(set(blank)) == 1 else "a picture that is transparent"
    return None


def _flattened(image: Image.Image) -> list[Image.Image]:
    """A picture in RGB as it looks: one with transparency in front of black and in front of white."""
    if not image.has_transparency_data:
        return [rgb(image)]
    check_size(image, "an image")
    try:
        layers = image.convert("RGBA")
    except Exception as reason:  # decoders meet damaged files in many ways
        raise ImageError(f"an image cannot be decoded ({type(reason).__name__}: {reason}): save it again") from reason
    grounds = [Image.new("RGBA", image.size, colour) for colour in ("black", "white")]
    return [Image.alpha_composite(ground, layers).convert("RGB") for ground in grounds]


def _median_colour(pixels: np.ndarray) -> str | None:
    """The colour of a blank picture, as `#rrggbb`; `None` of any other."""
    colour = np.median(pixels, axis=(0, 1))
    same = (np.abs(pixels - colour) <= SAME_COLOUR).all(-1).mean()
    return "#" + "".join(f"{int(value):02x}" for value in colour) if same >= BLANK_SHARE else None


def png(image: Image.Image, facts: Mapping[str, str] | None = None) -> bytes:
    """A picture as a PNG file in RGB.

    Args:
        image: The picture.
        facts: Texts that the file holds beside it, by keyword (PNG's `iTXt`): what made the picture, for instance.
    """
    buffer, texts = io.BytesIO(), PngInfo()
    for keyword, text in (facts or {}).items():
        texts.add_itxt(keyword, text)
    image.convert("RGB").save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()
