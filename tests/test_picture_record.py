"""What made a picture, inside of its PNG file."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure.errors import ImageError
from erasure.images import png
from erasure.picture_record import RECORD_LIMIT, PictureRecord, is_png, png_info, read_record

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
RECORD: PictureRecord = {
    "format": 1, "version": "0.1.0", "command": "generate", "model": "canvas-sd", "fingerprint": "ab", "seed": 3,
    "erasures": [{"name": "cat-uce", "strategy": "uce", "fingerprint": "cd", "strength": 0.5}],
    "prompt": "a cat, café \u732b", "settings": {"num_inference_steps": 4, "compose": ["cat"]},
}  # fmt: skip


def with_text(path: Path, text: str) -> Path:
    info = png_info(RECORD)
    info.chunks.clear()
    info.add_itxt("erasure", text)
    PICTURE.save(path, pnginfo=info)
    return path


def test_a_record_comes_back_and_the_pixels_are_the_same(tmp_path: Path) -> None:
    for number, prompt in enumerate(("a cat, café \u732b", "a cat " * 1000)):
        record: PictureRecord = {**RECORD, "prompt": prompt}
        content = png(PICTURE, record)
        assert content == png(PICTURE, record), "nothing of the moment or the machine is in it"
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        assert read_record(path) == record
        assert is_png(path)
        assert Image.open(path).tobytes() == Image.open(io.BytesIO(png(PICTURE))).tobytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "JSON"),
        (json.dumps({**RECORD, "format": 2}), "update the package"),
        (json.dumps({**RECORD, "colour": "red"}), "colour"),
        (json.dumps({key: value for key, value in RECORD.items() if key != "seed"}), "seed"),
        (json.dumps({**RECORD, "command": "paint"}), "command"),
        (json.dumps([1]), "cannot be read as what it should be"),
        ("[" * 5000, "JSON"),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        read_record(with_text(tmp_path / "picture.png", text))


def bomb(path: Path) -> Path:
    """A record of 200 MB in a small file."""
    content = png(PICTURE)
    data = b"erasure\0\1\0\0\0" + zlib.compress(b" " * 200 * 2**20, 9)
    chunk = struct.pack(">I", len(data)) + b"iTXt" + data + struct.pack(">I", zlib.crc32(b"iTXt" + data))
    path.write_bytes(content[:33] + chunk + content[33:])
    return path


def test_files_without_a_record_are_named(tmp_path: Path) -> None:
    plain, photo, broken = (tmp_path / name for name in ("plain.png", "photo.jpg", "broken.png"))
    plain.write_bytes(png(PICTURE))
    PICTURE.save(photo)
    broken.write_bytes(png(PICTURE, RECORD)[:40])
    for path, said in (
        (plain, "does not say what made it"), (photo, "no PNG file"), (broken, "broken.png"),
        (tmp_path / "none.png", "none.png"), (bomb(tmp_path / "bomb.png"), "bomb.png"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=said):
            read_record(path)
    assert not is_png(photo)
    assert not is_png(tmp_path / "none.png")
    assert not is_png(tmp_path)


def test_a_record_that_could_not_be_read_again_is_not_written() -> None:
    long: Any = {**RECORD, "prompt": "a" * RECORD_LIMIT}
    with pytest.raises(ImageError, match="--omit-prompt"):
        png(PICTURE, long)
