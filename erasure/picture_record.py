"""What made a picture, kept inside of its PNG file: model, erasures, prompt, seed, settings and version.

A record is JSON in an `iTXt` chunk under the keyword `erasure`, ahead of the pixels. It holds no date and no path, so
that the same call writes the same bytes and says nothing of the machine that made them.
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
"""Version of what a record holds."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
RECORD_LIMIT = 2**20
"""Characters of a record."""
FILE_LIMIT = 256 * 2**20
"""Bytes of a picture."""


@with_config(ConfigDict(extra="forbid"))
class AttachedErasure(TypedDict):
    """An erasure that was attached while a picture was drawn."""

    name: str
    strategy: str
    fingerprint: str
    """Of its tensors and options; see `Erasure.fingerprint`."""
    strength: float


@with_config(ConfigDict(extra="forbid"))
class PictureRecord(TypedDict):
    """What made a picture."""

    format: int
    version: str
    """Version of this package."""
    command: Literal["generate", "remove", "demo", "serve"]
    model: str
    """Name of a repository or of an embedded model; of a folder its last part alone."""
    fingerprint: str
    """Of the model's weights without erasures; see `erasure.cache.model_fingerprint`."""
    erasures: list[AttachedErasure]
    """In the order in which they were attached; empty for a stock model."""
    prompt: NotRequired[str]
    negative_prompt: NotRequired[str]
    seed: int
    """Of the CPU generator of the noise."""
    settings: dict[str, JsonValue]
    """Arguments of the call besides."""


def called(model: str) -> str:
    """A model's name as records have it: where a folder lies tells others nothing, and is not theirs to know."""
    return Path(os.path.realpath(model)).name if os.path.exists(model) else model


def png_info(record: PictureRecord) -> PngImagePlugin.PngInfo:
    """The chunk of a record, as Pillow's PNG writer takes it.

    Raises:
        ImageError: It is too long to be read again.
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
    """Whether a file is there that begins as PNG files do."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except (OSError, ValueError):
        return False


def read_record(path: str | Path, *, error: type[ErasureError] = ImageError) -> PictureRecord:
    """What made a picture. The pixels are not decoded.

    Args:
        path: The PNG file.
        error: What is raised.

    Raises:
        ErasureError: It is missing, no PNG file, damaged, holds no record, or one that a newer version wrote.
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
