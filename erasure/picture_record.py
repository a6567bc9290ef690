"""Records of a picture's origin inside of its PNG file: model, erasures, prompt, seed, settings and version.

A record is JSON in an `iTXt` chunk with the keyword `erasure`, before the pixels. It has no date and no path, so that
the same call writes the same bytes and nothing is disclosed about the machine.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NotRequired

from PIL import Image, PngImagePlugin
from pydantic import ConfigDict, JsonValue, with_config
from typing_extensions import TypedDict

from erasure.errors import ErasureError, ImageError
from erasure.files import read_bytes
from erasure.files.reading import parsed

KEYWORD = "erasure"
"""Keyword of the chunk."""
FORMAT = 1
"""Version of the record's format."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
RECORD_LIMIT = 2**20
"""Largest number of characters of a record."""
FILE_LIMIT = 256 * 2**20
"""Largest size of a picture's file in bytes."""


@with_config(ConfigDict(extra="forbid"))
class AttachedErasure(TypedDict):
    """An erasure that was attached while a picture was drawn."""

    name: str
    strategy: str
    fingerprint: str
    """Fingerprint of its tensors and options; see `Erasure.fingerprint`."""
    strength: float


@with_config(ConfigDict(extra="forbid"))
class PictureRecord(TypedDict):
    """The origin of a picture."""

    format: int
    version: str
    """Version of this package."""
    command: Literal["generate", "remove", "demo", "serve"]
    model: str
    """Name of a repository or of an embedded model; for a folder only the last part of its path."""
    fingerprint: str
    """Fingerprint of the model's weights without erasures; see `erasure.cache.model_fingerprint`."""
    erasures: list[AttachedErasure]
    """Attached erasures, in the order in which they were attached; empty for a stock model."""
    prompt: NotRequired[str]
    negative_prompt: NotRequired[str]
    seed: int
    """Seed of the CPU random generator of the noise."""
    settings: dict[str, JsonValue]
    """Other arguments of the call."""


def called(model: str) -> str:
    """Give a model's name for records, without the private path of a folder."""
    return Path(os.path.realpath(model)).name if os.path.exists(model) else model


def png_info(record: PictureRecord) -> PngImagePlugin.PngInfo:
    """Make the chunk of a record for Pillow's PNG writer.

    Raises:
        ImageError: The record is too long to be read again.
    """
    text = json.dumps(record, allow_nan=False)
    if len(text) > RECORD_LIMIT:
        raise ImageError(
            f"what made a picture takes {len(text):,} characters, allowed are {RECORD_LIMIT:,}: shorten the prompt, "
            "or leave it out (--omit-prompt)"
        )
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEYWORD, text, zip=len(text) > 1000)
    return info


def is_png(path: str | Path) -> bool:
    """Whether a file exists that begins as PNG files do."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except (OSError, ValueError):
        return False


def read_record(path: str | Path, *, error: type[ErasureError] = ImageError) -> PictureRecord:
    """Read the origin of a picture; its pixels are not decoded.

    Args:
        path: The PNG file.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: The file is missing, not a PNG file, damaged, has no record, or one of a newer version.
    """
    content = bytes(read_bytes(path, FILE_LIMIT, error=error))
    if not content.startswith(SIGNATURE):
        raise error(f"{path} is no PNG file: records of what made a picture are kept in PNG files alone")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            found = image.info.get(KEYWORD)
    except Exception as reason:  # damaged files fail in many ways
        raise error(f"{path} cannot be read ({type(reason).__name__}: {reason}): it is damaged; fetch it again") from (
            reason
        )
    if not isinstance(found, str):
        raise error(
            f"{path} does not say what made it: it was drawn by another program or an earlier version, or the record "
            "was lost where the picture was saved again"
        )
    if len(found) > RECORD_LIMIT:
        raise error(f"{path} holds a record of {len(found):,} characters; allowed are {RECORD_LIMIT:,}")
    where = f"what {path} says of what made it"
    coded = found.encode("utf-8", "surrogatepass")
    head: Mapping[str, JsonValue] = parsed(coded, dict[str, JsonValue], where, error=error)
    if isinstance(version := head.get("format"), int) and version > FORMAT:
        raise error(f"{where} has the format {version}, this version reads up to {FORMAT}: update the package")
    record: PictureRecord = parsed(coded, PictureRecord, where, error=error)
    return record


__all__ = ["AttachedErasure", "PictureRecord", "called", "is_png", "png_info", "read_record"]
