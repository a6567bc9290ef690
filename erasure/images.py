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
from erasure.picture_record import PictureRecord, png_info

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Allowed formats. Others run programs (EPS), or have no pixels (WMF)."""
BYTES_LIMIT = 256 * 2**20
"""Largest size of a file in bytes."""
PIXELS_LIMIT = 64 * 2**20
"""Largest number of pixels of a picture: 8192 x 8192."""
SMALLEST_SIDE = 8
"""Smallest side of a picture in pixels below which nothing in it could be recognised."""
SAME_COLOUR = 10
"""Largest difference, of 256 levels, between a pixel of a blank picture and the picture's median colour."""
BLANK_SHARE = 0.99
"""Share of the pixels that have the median colour in a blank picture. In line drawings of the embedded world at
most 0.98 of the pixels have it."""


def read_image(
    path: str | Path, *, formats: tuple[str, ...] = FORMATS, limit: int = PIXELS_LIMIT,
    error: type[ErasureError] = ImageError,
) -> Image.Image:  # fmt: skip
    """Read and decode a picture in the mode of its file, turned as its EXIF data say.

    Args:
        path: File of the picture; links are followed.
        formats: Allowed formats, by Pillow's names.
        limit: Largest number of pixels.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: The file is missing, not a regular file, not a picture, of another format, animated, too large,
            or damaged.
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
    except Exception as reason:  # decoders fail on damaged files in many ways
        raise error(
            f"{path} cannot be read as a picture ({type(reason).__name__}: {reason}): it is damaged; export it again"
        ) from reason


def read_rgb(
    path: str | Path, *, formats: tuple[str, ...] = FORMATS, error: type[ErasureError] = ImageError
) -> Image.Image:
    """Read a picture in RGB; see `read_image` and `rgb`."""
    return rgb(read_image(path, formats=formats, error=error), str(path), error=error)


def rgb(image: Image.Image, where: str = "an image", *, error: type[ErasureError] = ImageError) -> Image.Image:
    """Convert a picture to RGB as viewers show it: turned as its EXIF data say, transparent parts on white.

    16 bits are scaled to 8; Pillow itself would clip all values above 255.

    Args:
        image: The picture, decoded or still in its file.
        where: Origin of the picture, for messages.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: The picture is too large, animated, damaged, or its values have an unknown range.
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
    except Exception as reason:  # decoders fail on damaged files in many ways
        raise error(f"{where} cannot be decoded ({type(reason).__name__}: {reason}): save it again") from reason


def in_mode_of(original: Image.Image, made: Image.Image) -> Image.Image:
    """Convert a picture that was changed in RGB back to the original's mode and colour profile.

    Unchanged pixels keep every bit, and opacity does not change. In a pixel that is not opaque, the colour is chosen
    so that it looks the same on white. Palettes become RGB, black and white becomes grey.

    Args:
        original: The original picture.
        made: The original in RGB (see `rgb`) with some pixels changed, in the same size.

    Returns:
        The picture in mode L, LA, I;16, RGB or RGBA.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about transparency has been given already
        seen = np.asarray(rgb(original))
    new = np.asarray(made.convert("RGB"))
    changed = (new != seen).any(-1)
    if original.has_transparency_data:
        values = np.array(original.convert("RGBA"))
        opacity = values[..., 3:].astype(np.float32) / 255
        colours = (new - 255 * (1 - opacity)) / np.maximum(opacity, 1 / 255)
        values[..., :3] = np.where(changed[..., None], colours.round().clip(0, 255), values[..., :3])
        result = Image.fromarray(values).convert("LA" if original.mode == "LA" else "RGBA")
    elif original.mode.startswith("I;16"):
        grey = np.asarray(made.convert("L")).astype(np.uint16) * 257
        result = Image.fromarray(np.where(changed, grey, np.asarray(original).astype(np.uint16)))
    else:
        result = made.convert("L" if original.mode in ("1", "L") else "RGB")
    if (profile := original.info.get("icc_profile")) and original.mode not in ("CMYK", "LAB", "YCbCr"):
        result.info["icc_profile"] = profile
    return result


def upright(image: Image.Image) -> Image.Image:
    """Copy a picture, turned and mirrored as its EXIF data say, and remove these data."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        # The EXIF data are damaged but the pixels are not: viewers show these as stored.
        return image.copy()


def on_white(image: Image.Image, where: str) -> Image.Image:
    """A picture in RGBA on a white ground, in RGB. Warns where that can be seen: colours behind it are not shown."""
    if image.getchannel("A").getextrema() != (255, 255):
        warnings.warn(f"{where} is transparent in places: they are taken as white", stacklevel=3)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_single(image: Image.Image, where: str, *, error: type[ErasureError] = ImageError) -> None:
    """Refuse a picture that is an animation or a stack of pages.

    Raises:
        ErasureError: The file has several pictures.
    """
    # MPO files from phones are photographs with additional pictures, not animations.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise error(f"{where} holds several pictures: give a file with one")


def check_size(
    image: Image.Image, where: str, limit: int = PIXELS_LIMIT, *, error: type[ErasureError] = ImageError
) -> None:
    """Refuse a picture without pixels or with too many; nothing is decoded.

    Raises:
        ErasureError: The picture has no pixels, or more than the limit.
    """
    width, height = image.size
    if not 0 < width * height <= limit:
        raise error(f"{where} has {width} x {height} pixels; allowed: 1 to {limit:,}. Scale it")


def flaw(image: object) -> str | None:
    """Say why a generated picture shows nothing that a detector could judge; `None` when it may show something.

    This is the case for an object that is not a picture, for a picture that cannot be decoded or has values that are
    not finite, for one with a side shorter than `SMALLEST_SIDE`, and for one of a single colour or nearly so, also if
    it is fully transparent. Safety checkers and collapsed models give such pictures, and a detector would still answer
    for them.
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
    """Give a picture in RGB; one with transparency on black and on white."""
    if not image.has_transparency_data:
        return [rgb(image)]
    check_size(image, "an image")
    try:
        layers = image.convert("RGBA")
    except Exception as reason:  # decoders fail on damaged files in many ways
        raise ImageError(f"an image cannot be decoded ({type(reason).__name__}: {reason}): save it again") from reason
    grounds = [Image.new("RGBA", image.size, colour) for colour in ("black", "white")]
    return [Image.alpha_composite(ground, layers).convert("RGB") for ground in grounds]


def _median_colour(pixels: np.ndarray) -> str | None:
    """Give the colour of a blank picture as `#rrggbb`; `None` for other pictures."""
    colour = np.median(pixels, axis=(0, 1))
    same = (np.abs(pixels - colour) <= SAME_COLOUR).all(-1).mean()
    return "#" + "".join(f"{int(value):02x}" for value in colour) if same >= BLANK_SHARE else None


def png(image: Image.Image, record: PictureRecord | None = None) -> bytes:
    """Encode a picture as a PNG file in RGB.

    Args:
        image: The picture.
        record: Origin of the picture, which is written into the file.
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", pnginfo=None if record is None else png_info(record))
    return buffer.getvalue()
