"""Reading pictures: what is no picture, too large, animated or damaged is a named error before it is decoded."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erasure.errors import ErasureError, EvaluationError, ImageError
from erasure.images import PIXELS_LIMIT, flaw, png, read_image, read_rgb, rgb


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
WHOLE = encoded(PICTURE, "PNG")
FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no picture"),
        (b"a text file", "no picture"),
        (WHOLE[:100], "damaged"),
        (WHOLE[: len(WHOLE) // 2], "damaged"),
        (WHOLE[:60] + bytes([WHOLE[60] ^ 1]) + WHOLE[61:], "damaged"),
        (encoded(PICTURE, "JPEG")[:300], "damaged"),
        (bomb(60_000, 60_000), "pixels"),
        (bomb(9_000, 9_000), f"9000 x 9000 pixels; allowed: 1 to {PIXELS_LIMIT:,}"),
        (bomb(2**31 - 1, 1), "pixels"),
        (bomb(0, 5), "cannot be read|pixels|no picture"),
        (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "several pictures"),
        (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "several pictures"),
        (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "several pictures"),
        (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "several pictures"),
        (encoded(PICTURE, "EPS"), "no picture"),
        (encoded(PICTURE, "PPM"), "no picture"),
    ],
)
def test_what_is_no_picture_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=said) as caught:
        read_rgb(file)
    assert str(file) in str(caught.value)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    for name, said in (("pipe.png", "a named pipe"), ("link.png", "No such file"), (".", "a folder"),
                       ("x" * 300, "too long"), ("a\0b", "null")):  # fmt: skip
        with pytest.raises(EvaluationError, match=said):
            read_image(tmp_path / name, error=EvaluationError)


def test_usual_pictures_are_read(tmp_path: Path) -> None:
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        (tmp_path / "picture.png").write_bytes(encoded(PICTURE.convert(mode), "PNG"))
        found = read_rgb(tmp_path / "picture.png")
        assert (found.mode, found.size) == ("RGB", (32, 24))
        assert np.array_equal(np.array(found), np.array(PICTURE.convert(mode).convert("RGB")))
    for kind in ("JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        (tmp_path / "picture").write_bytes(encoded(PICTURE, kind))
        assert read_rgb(tmp_path / "picture").size == (32, 24)
        with pytest.raises(ErasureError, match="no picture in PNG; convert"):
            read_image(tmp_path / "picture", formats=("PNG",))
    # What phones write: a photograph with a second one behind it.
    (tmp_path / "phone.jpg").write_bytes(encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:]))
    assert read_rgb(tmp_path / "phone.jpg").getpixel((0, 0))[0] > 200


def test_sixteen_bits_become_eight_and_are_not_cut_off(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array(read_rgb(tmp_path / "deep.png"))[0, :, 0].tolist() == list(range(256))
    with pytest.raises(ImageError, match="'F', whose range is not known"):
        rgb(Image.fromarray(np.zeros((4, 4), dtype=np.float32)))


def test_a_lazily_opened_damaged_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(WHOLE[: len(WHOLE) // 2])
    with Image.open(tmp_path / "half.png") as image, pytest.raises(EvaluationError, match="image 3 cannot be decoded"):
        rgb(image, "image 3", error=EvaluationError)


def test_png_is_read_again() -> None:
    with Image.open(io.BytesIO(png(PICTURE))) as again:
        assert np.array_equal(np.array(again), np.array(PICTURE))


SEEN = PICTURE.convert("RGB")
STORED = {
    1: SEEN,
    2: SEEN.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: SEEN.transpose(Image.Transpose.ROTATE_180),
    4: SEEN.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: SEEN.transpose(Image.Transpose.TRANSPOSE),
    6: SEEN.transpose(Image.Transpose.ROTATE_90),
    7: SEEN.transpose(Image.Transpose.TRANSVERSE),
    8: SEEN.transpose(Image.Transpose.ROTATE_270),
}
"""How a camera that was held so stores what is seen, by the number that EXIF has for it."""


@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
    ):
        (tmp_path / "photo").write_bytes(encoded(STORED[orientation], kind, exif=exif, **options))
        with Image.open(tmp_path / "photo") as opened:
            for found in (read_rgb(tmp_path / "photo"), rgb(read_image(tmp_path / "photo")), rgb(opened)):
                assert found.size == SEEN.size
                away = np.abs(np.array(found).astype(int) - np.array(SEEN)).mean()
                assert away < (3 if kind == "JPEG" else 1e-9), kind
        # Nothing turns it a second time.
        assert rgb(rgb(read_image(tmp_path / "photo"))).size == SEEN.size


def test_damaged_exif_leaves_the_picture_as_it_is_stored() -> None:
    image = PICTURE.copy()
    image.info["exif"] = b"Exif\x00\x00no header"
    assert np.array_equal(np.array(rgb(image)), np.array(PICTURE))


def test_what_is_transparent_is_white_and_said() -> None:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.fromarray(np.full((24, 32), 255, dtype=np.uint8)))
    assert np.array_equal(np.array(rgb(image)), np.array(PICTURE))
    image.putpixel((3, 2), (10, 20, 30, 0))
    with pytest.warns(UserWarning, match="an image is transparent in places"):
        assert rgb(image).getpixel((3, 2)) == (255, 255, 255)


def test_an_animation_is_refused_wherever_it_comes_from() -> None:
    moving = io.BytesIO(encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]))
    with Image.open(moving) as opened, pytest.raises(ImageError, match="several pictures"):
        rgb(opened)


# Pictures that show nothing -----------------------------------------------------------------------------------------


def with_alpha(colour: str, alpha: int) -> Image.Image:
    """A photograph's worth of colours behind one value of transparency."""
    layers = Image.linear_gradient("L").resize((32, 32)).convert("RGB").convert("RGBA")
    layers.putalpha(alpha)
    return layers if colour == "gradient" else Image.new("RGBA", (32, 32), colour)


def noisy(centre: int, reach: int) -> Image.Image:
    values = np.random.default_rng(0).integers(centre - reach, centre + reach + 1, (64, 64, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def speck(share: float) -> Image.Image:
    """White but for a black square of this share of the pixels."""
    side = round(100 * share**0.5)
    image = Image.new("RGB", (100, 100), "white")
    image.paste("black", (10, 10, 10 + side, 10 + side))
    return image


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (64, 64), "black"), "one colour, #000000"),
        (Image.new("RGB", (64, 64), "white"), "one colour, #ffffff"),
        (Image.new("RGB", (64, 64), "#7f3010"), "one colour, #7f3010"),
        (Image.new("L", (64, 64), 128), "one colour, #808080"),
        (Image.new("1", (64, 64), 1), "one colour"),
        (Image.new("P", (64, 64), 3), "one colour"),
        (noisy(128, 10), "one colour"),
        (noisy(0, 8), "one colour"),
        (speck(0.009), "one colour, #ffffff"),
        (with_alpha("gradient", 0), "transparent"),
        (with_alpha("red", 255), "one colour, #ff0000"),
        (Image.new("RGBA", (32, 32), (255, 0, 0, 0)), "transparent"),
        (Image.new("RGB", (1, 1)), "1 x 1 pixels"),
        (Image.new("RGB", (7, 64)), "less than 8 on a side"),
        (Image.fromarray(np.full((64, 64), np.nan, dtype=np.float32)), "not finite"),
        (Image.fromarray(np.full((64, 64), 0.5, dtype=np.float32)), "range is not known"),
        (None, "no picture but NoneType"),
        (np.zeros((64, 64, 3), dtype=np.uint8), "no picture but ndarray"),
    ],
)
def test_pictures_that_show_nothing_say_why(image: object, reason: str) -> None:
    assert reason in str(flaw(image))


def test_pictures_that_show_something_have_no_flaw() -> None:
    gradient = Image.linear_gradient("L").resize((32, 32))
    for image in (PICTURE, gradient, speck(0.02), noisy(128, 60), with_alpha("gradient", 255), gradient.convert("P")):
        assert flaw(image) is None
    # A white drawing on a transparent ground is seen on every ground but a white one.
    drawing = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    drawing.paste((255, 255, 255, 255), (4, 4, 20, 20))
    assert flaw(drawing) is None


def test_a_picture_that_cannot_be_decoded_has_a_flaw() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    assert "cannot be decoded" in str(flaw(Image.open(io.BytesIO(content[: len(content) // 2]))))
