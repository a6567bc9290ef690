"""`erasure remove` and `erasure generate --compose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure.cli.main import main


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, Path]:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:16, 8:16] = 255
    image, hole = tmp_path / "scene.png", tmp_path / "mask.png"
    Image.fromarray(noise).save(image)
    Image.fromarray(mask).save(hole)
    return image, hole


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    # A progress bar may stand above the error.
    return capsys.readouterr().err.splitlines()[-1]


def test_remove_by_mask(tiny_pipe_folder: Path, scene: Any, tmp_path: Path, capsys: Any) -> None:
    image, mask = scene
    command = ["remove", "--model", str(tiny_pipe_folder), "--image", str(image), "--mask", str(mask), "--steps", "3"]
    out = tmp_path / "clean.png"
    assert main([*command, "--out", str(out), "--count", "2", "--json", "--mask-out", str(tmp_path / "used.png")]) == 0
    said = json.loads(capsys.readouterr().out)
    files = [tmp_path / "clean-0.png", tmp_path / "clean-1.png"]
    assert [row["file"] for row in said["images"]] == [str(file) for file in files]
    made, source = (np.asarray(Image.open(file)) for file in (files[0], image))
    assert made.shape == source.shape
    assert np.array_equal(made[24:], source[24:])
    assert not np.array_equal(made[8:16, 8:16], source[8:16, 8:16])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "used.png")), np.asarray(Image.open(mask)))
    again = refused(capsys, *command, "--out", files[0])
    assert "--overwrite" in again


def test_remove_says_what_is_wrong(tiny_pipe_folder: Path, scene: Any, tmp_path: Path, capsys: Any) -> None:
    image, mask = scene
    out = tmp_path / "clean.png"
    start = ["remove", "--model", tiny_pipe_folder, "--image", image]
    assert "--mask" in refused(capsys, *start, "--out", out)
    assert "not both" in refused(capsys, *start, "--out", out, "--mask", mask, "--words", "cat")
    assert "clean.png" in refused(capsys, *start, "--mask", mask, "--out", tmp_path / "clean")
    assert "no folder" in refused(capsys, *start, "--mask", mask, "--out", tmp_path / "none" / "clean.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert "cannot be read: it is no picture" in refused(capsys, *start[:-1], broken, "--mask", mask, "--out", out)
    assert "preset" in refused(capsys, *start, "--mask", mask, "--out", out, "--preset", "none")
    full = tmp_path / "full.png"
    Image.new("L", (32, 32), 255).save(full)
    assert "whole image" in refused(capsys, *start, "--mask", full, "--out", out)
    for options, said in (
        (("--out", out, "--mask-out", out), "named twice"),
        (("--out", out, "--mask-out", tmp_path / "used.psd"), "no ending of an image"),
        (("--out", tmp_path / "clean.pdf"), "no ending of an image"),
        (("--out", mask), "--overwrite"),
    ):
        assert said in refused(capsys, *start, "--mask", mask, *options)
    assert not out.exists()


def test_a_brush_on_a_transparent_ground_is_a_mask(tiny_pipe_folder: Path, scene: Any, tmp_path: Path) -> None:
    image, mask = scene
    strokes = Image.new("RGBA", (32, 32))
    strokes.paste((255, 0, 0, 255), (8, 8, 16, 16))
    strokes.save(tmp_path / "strokes.png")
    (tmp_path / "clean.png").symlink_to(image)
    before = image.read_bytes()
    command = ["remove", "--model", tiny_pipe_folder, "--image", image, "--mask", tmp_path / "strokes.png", "--out",
               tmp_path / "clean.png", "--mask-out", tmp_path / "used.png", "--steps", "2", "--overwrite"]  # fmt: skip
    assert main(list(map(str, command))) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "used.png")), np.asarray(Image.open(mask)))
    # A link at the place of the result is replaced, not followed.
    assert image.read_bytes() == before
    assert not (tmp_path / "clean.png").is_symlink()


def test_remove_by_words_on_the_embedded_model(tmp_path: Path, capsys: Any) -> None:
    """Beside an erasure, which a picture that is handed in goes past: that is said, once."""
    import erasure
    from erasure.assets.scenes import Scene, render
    from erasure.eval.detectors import CanvasJudge

    image, out, used = (tmp_path / name for name in ("scene.png", "clean.png", "used.png"))
    drawn = render(Scene(("apple",), "noto", "blue"))
    Image.fromarray(drawn.image).save(image)
    made = erasure.erase(erasure.load_pipeline("canvas-sd", device="cpu"), "gun", "uce", attach=False, progress=False)
    command = ["remove", "--model", "canvas-sd", "--image", image, "--words", "apple", "--out", out]
    command += ["--mask-out", used, "--erasure", made.save(tmp_path / "gun")]
    capsys.readouterr()
    assert main(list(map(str, command))) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert "a picture that is handed in starts the drawing past gun" in warned[0]
    found = np.asarray(Image.open(used)) > 127
    assert (found & drawn.masks[0]).sum() / (found | drawn.masks[0]).sum() > 0.6
    before, after = CanvasJudge()([Image.open(image), Image.open(out)])
    assert before.objects == ("apple",)
    assert "apple" not in after.objects


def test_words_that_are_not_in_the_image_are_refused_with_their_score(tmp_path: Path, capsys: Any) -> None:
    """A picture of a cat and a dog; what was looked at is kept as an overlay."""
    from erasure.assets.scenes import Scene, render

    image, out, over, used = (tmp_path / name for name in ("scene.png", "clean.png", "over.png", "used.png"))
    drawn = render(Scene(("cat", "dog"), "noto", "blue"))
    Image.fromarray(drawn.image).save(image)
    command = ["remove", "--model", "canvas-sd", "--image", image, "--out", out, "--steps", "4"]
    for words in (["car"], ["castle", "--others", "cat", "dog"], ["cat", "car", "--others", "dog"]):
        said = refused(capsys, *command, "--words", *words, "--overlay-out", over, "--overwrite")
        assert "is not found in the image: its score is" in said
        assert "--others" in said
        assert Image.open(over).size == (64, 64)
    assert not out.exists()
    command += ["--words", "cat", "--others", "dog", "--mask-out", used, "--overlay-out", over, "--overwrite"]
    assert main([*map(str, command), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["words"]["cat"] > 0.05
    found = np.asarray(Image.open(used)) > 127
    assert (found & drawn.masks[0]).sum() / (found | drawn.masks[0]).sum() > 0.6
    red = np.asarray(Image.open(over)).astype(int) - drawn.image
    assert (red[found][:, 0] >= 0).all()
    assert not red[~found].any()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_mask_drawn_on_what_one_sees_fits_a_photograph(
    orientation: int, tiny_pipe_folder: Path, tmp_path: Path
) -> None:
    """The image is stored as a camera holds it, the mask as it was drawn on the upright image."""
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    seen = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 42, 3), dtype=np.uint8))
    stored = seen if turn[orientation] is None else seen.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    mask = np.zeros((30, 42), dtype=np.uint8)
    mask[4:10, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    photo, drawn = tmp_path / "photo.png", tmp_path / "mask.png"
    command = ["remove", "--model", tiny_pipe_folder, "--image", photo, "--mask", drawn, "--steps", "2",
               "--out", tmp_path / "clean.png"]  # fmt: skip
    assert main(list(map(str, command))) == 0
    made = np.asarray(Image.open(tmp_path / "clean.png"))
    assert made.shape == (30, 42, 3)
    changed = (made != np.asarray(seen)).any(-1)
    assert changed[4:10, 4:12].any()
    changed[:16, :18] = False
    assert not changed.any()


def test_generate_composes(tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    start = ["generate", "--model", str(tiny_pipe_folder), "--prompt", "a cat and a dog", "--steps", "3"]
    assert main([*start, "--out", str(tmp_path / "plain")]) == 0
    assert main([*start, "--out", str(tmp_path / "composed"), "--compose", "cat", "dog"]) == 0
    plain, composed = (next((tmp_path / name).glob("*.png")).read_bytes() for name in ("plain", "composed"))
    assert plain != composed
    capsys.readouterr()
    assert "house" in refused(capsys, *start, "--out", tmp_path / "not", "--compose", "cat", "house")
