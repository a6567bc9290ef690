"""`erasure remove` on a folder of images, and on images of every mode."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from erasure.cli import remove
from erasure.cli.main import main
from erasure.picture_record import read_record

NOISE = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
HOLE = np.zeros((64, 96), dtype=np.uint8)
HOLE[8:16, 8:16] = 255
FAR = (slice(32, None), slice(48, None))
"""Rows and columns that no removal of these tests reaches."""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three images, one in a folder below, and masks, one with another ending."""
    for name in ("images/a.png", "images/b.bmp", "images/more/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(path)
    for name in ("masks/a.png", "masks/b.png", "masks/more/c.gif"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(HOLE).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_text("no image")
    return tmp_path


def run(model: Path, folder: Path, *more: object, code: int = 0) -> int:
    command = ["remove", "--model", model, "--image", folder / "images", "--out", folder / "out", "--steps", "2"]
    if "--words" not in more and "--mask" not in more:
        command += ["--mask", folder / "masks"]
    found = main(list(map(str, [*command, *more])))
    assert found == code
    return found


def written(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every result."""
    files = [path for path in (folder / "out").rglob("*.*") if path.suffix in (".png", ".bmp", ".jpg")]
    return {
        path.relative_to(folder / "out").as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files
    }


def test_every_image_is_done_under_its_own_name(tiny_pipe_folder: Path, folders: Path, capsys: Any) -> None:
    run(tiny_pipe_folder, folders, "--mask-out", folders / "used", "--json")
    said = json.loads(capsys.readouterr().out)
    assert [(row["image"], row["result"]) for row in said["images"]] == [
        ("a.png", "done"), ("b.bmp", "done"), ("more/c.png", "done"),
    ]  # fmt: skip
    assert said["failed"] == {}
    assert said["num_inference_steps"] == 2
    assert set(written(folders)) == {"a.png", "b.bmp", "more/c.png"}
    for name in written(folders):
        made = np.asarray(Image.open(folders / "out" / name))
        assert (made[8:16, 8:16] != NOISE[8:16, 8:16]).any()
        assert np.array_equal(made[FAR], NOISE[FAR])
    assert np.array_equal(np.asarray(Image.open(folders / "used" / "b.png")), HOLE)
    record = read_record(folders / "out" / "more" / "c.png")
    assert (record["command"], record["seed"], record["settings"]["preset"]) == ("remove", 0, "default")
    # Again: nothing is done twice.
    before = written(folders)
    run(tiny_pipe_folder, folders, "--mask-out", folders / "used", "--json")
    assert {row["result"] for row in json.loads(capsys.readouterr().out)["images"]} == {"done before"}
    assert written(folders) == before
    # Other options are another work.
    run(tiny_pipe_folder, folders, "--seed", "3", code=2)
    assert "seed: 0 in the first, 3 in the second" in capsys.readouterr().err
    assert written(folders) == before
    run(tiny_pipe_folder, folders, "--seed", "3", "--overwrite")
    assert "3 of 3 images" in capsys.readouterr().out
    assert written(folders)["a.png"][1] != before["a.png"][1]


def test_what_is_wrong_is_named_and_the_others_are_done(tiny_pipe_folder: Path, folders: Path, capsys: Any) -> None:
    (folders / "images" / "broken.png").write_bytes(b"no image")
    (folders / "images" / "alone.png").write_bytes((folders / "images" / "a.png").read_bytes())
    Image.new("L", (96, 64), 255).save(folders / "masks" / "b.png")
    shutil.copy(folders / "masks" / "a.png", folders / "masks" / "broken.png")
    run(tiny_pipe_folder, folders, "--json", code=2)
    shown = capsys.readouterr()
    failed = json.loads(shown.out)["failed"]
    assert set(failed) == {"alone.png", "b.bmp", "broken.png"}
    assert "no mask alone" in failed["alone.png"]
    assert "whole image" in failed["b.bmp"]
    assert "no picture" in failed["broken.png"]
    last = shown.err.splitlines()[-1]
    assert "3 of 5 images could not be done: alone.png, b.bmp, broken.png" in last
    before = written(folders)
    assert set(before) == {"a.png", "more/c.png"}
    # Mended: only those are done.
    shutil.copy(folders / "masks" / "a.png", folders / "masks" / "alone.png")
    shutil.copy(folders / "masks" / "a.png", folders / "masks" / "b.png")
    (folders / "images" / "broken.png").unlink()
    run(tiny_pipe_folder, folders)
    shown = capsys.readouterr().out
    assert "4 of 4 images" in shown
    assert "2 of them from before" in shown
    after = written(folders)
    assert {name: after[name] for name in before} == before
    # A mask that was drawn anew is another task.
    Image.fromarray(np.roll(HOLE, 8, axis=1)).save(folders / "masks" / "a.png")
    run(tiny_pipe_folder, folders)
    again = written(folders)
    assert [name for name in again if again[name] != after[name]] == ["a.png"]


def test_a_killed_run_goes_on(tiny_pipe_folder: Path, folders: Path, capsys: Any, monkeypatch: Any) -> None:
    """Killed after the first image, in the middle of writing down the second."""
    real, calls = remove.Remover.remove, []

    def stop(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(remove.Remover, "remove", stop)
        run(tiny_pipe_folder, folders, code=130)
    with open(folders / "out" / "removal.jsonl", "ab") as file:
        file.write(b'{"image": "b.bmp", "image_sh')
    before = written(folders)
    assert set(before) == {"a.png"}
    run(tiny_pipe_folder, folders)
    after = written(folders)
    assert set(after) == {"a.png", "b.bmp", "more/c.png"}
    assert after["a.png"] == before["a.png"]
    rows = (folders / "out" / "removal.jsonl").read_text().splitlines()
    assert [json.loads(row)["image"] for row in rows] == ["a.png", "b.bmp", "more/c.png"]
    # A result that somebody removed is made again.
    (folders / "out" / "b.bmp").unlink()
    run(tiny_pipe_folder, folders)
    assert written(folders)["b.bmp"][1] == after["b.bmp"][1]


def test_a_full_disk_ends_the_run(tiny_pipe_folder: Path, folders: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise remove.OutputError("cannot write: No space left on device")

    monkeypatch.setattr(remove, "save", full)
    run(tiny_pipe_folder, folders, code=2)
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert not (folders / "out" / "removal.jsonl").exists()


def test_one_mask_for_all_and_png_for_all(tiny_pipe_folder: Path, folders: Path, capsys: Any) -> None:
    run(tiny_pipe_folder, folders, "--mask", folders / "masks" / "a.png", "--png", "--count", "2", "--omit-prompt")
    assert set(written(folders)) == {f"{name}-{index}.png" for name in ("a", "b", "more/c") for index in (0, 1)}
    assert read_record(folders / "out" / "b-1.png")["seed"] == 1
    assert "prompt" not in read_record(folders / "out" / "b-1.png")


def test_folders_that_cannot_be_worked_on_are_refused(tiny_pipe_folder: Path, folders: Path, capsys: Any) -> None:
    def refused(*more: object) -> str:
        run(tiny_pipe_folder, folders, *more, code=2)
        return str(capsys.readouterr().err.splitlines()[-1])

    assert "two of the folders are the same" in refused("--mask-out", folders / "out")
    (folders / "empty").mkdir()
    assert "none of the 3 images can be worked on" in refused("--mask", folders / "empty")
    assert "no preset 'none'" in refused("--preset", "none")
    assert "--crop-context" in refused("--crop-context", "1")
    assert not (folders / "out" / "removal.jsonl").exists()
    (folders / "out").mkdir(exist_ok=True)
    (folders / "out" / "mine.png").write_bytes(b"mine")
    assert "not empty" in refused()
    assert (folders / "out" / "mine.png").read_bytes() == b"mine"
    shutil.rmtree(folders / "images")
    (folders / "images").mkdir()
    (folders / "out" / "mine.png").unlink()
    assert "holds no image" in refused()
    single = ["remove", "--model", "none", "--image", str(folders / "masks" / "a.png"), "--mask",
              str(folders / "masks"), "--out", str(folders / "x.png")]  # fmt: skip
    assert main(single) == 2
    assert "folder of masks" in capsys.readouterr().err


def test_names_that_would_meet_are_refused_each(tiny_pipe_folder: Path, folders: Path, capsys: Any) -> None:
    Image.fromarray(NOISE).save(folders / "images" / "a.jpg")
    run(tiny_pipe_folder, folders, "--png", "--json", code=2)
    said = json.loads(capsys.readouterr().out)
    assert set(said["failed"]) == {"a.jpg", "a.png"}
    assert set(written(folders)) == {"b.png", "more/c.png"}


def test_results_within_the_folder_of_images_are_not_worked_on(
    tiny_pipe_folder: Path, folders: Path, capsys: Any
) -> None:
    for _ in range(2):
        run(tiny_pipe_folder, folders, "--out", folders / "images" / "clean")
        assert "3 of 3 images" in capsys.readouterr().out
    assert os.path.isfile(folders / "images" / "clean" / "more" / "c.png")


def test_words_that_are_not_found_are_told_for_their_image(
    tiny_pipe_folder: Path, folders: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The scores of random weights mean nothing: where the word is, this test says."""
    import torch

    from erasure.pipelines import StableDiffusionObjectRemovalPipeline
    from erasure.pipelines.localization import Localization

    looked = []

    def localize(self: Any, image: Any, words: Any, others: Any = ()) -> Localization:
        looked.append(tuple(words))
        mask = torch.from_numpy(HOLE > 0)[None, None]
        score = torch.full((1, 1), 1.0 if len(looked) != 2 else 0.0)
        return Localization(mask, mask.float(), torch.zeros(1, 3, 64, 96), ("cat",), score, 0.06)

    monkeypatch.setattr(StableDiffusionObjectRemovalPipeline, "localize", localize)
    run(tiny_pipe_folder, folders, "--words", "cat", "--json", "--overlay-out", folders / "over", code=2)
    said = json.loads(capsys.readouterr().out)
    assert set(said["failed"]) == {"b.bmp"}
    assert "'cat' is not found" in said["failed"]["b.bmp"]
    assert said["images"][0]["words"] == {"cat": 1.0}
    assert Image.open(folders / "over" / "b.png").size == (96, 64)
    assert read_record(folders / "out" / "a.png")["settings"]["words"] == ["cat"]


# Modes ---------------------------------------------------------------------------------------------------------------


def graded(mode: str) -> Image.Image:
    """A picture of a mode, with everything in it that the mode can hold."""
    if mode == "I;16":
        return Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257 + 5)
    if mode == "P with transparency":
        image = Image.fromarray(NOISE).quantize(16)
        image.info["transparency"] = 3
        return image
    image = Image.fromarray(NOISE)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))))
    return image.convert(mode)


@pytest.mark.filterwarnings("ignore:.*transparent")
@pytest.mark.parametrize("crop", [False, True], ids=["whole", "crop"])
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16", "P", "P with transparency", "1"])
def test_results_have_the_images_mode_and_every_bit_away_from_the_mask(
    mode: str, crop: bool, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    image, mask, out = (tmp_path / name for name in ("image.png", "mask.png", "out.png"))
    graded(mode).save(image)
    hole = np.zeros((64, 96), dtype=np.uint8)
    hole[4:12, 70:78] = 255
    Image.fromarray(hole).save(mask)
    command = ["remove", "--model", tiny_pipe_folder, "--image", image, "--mask", mask, "--out", out, "--steps", "2"]
    assert main([*map(str, command), *(["--crop"] if crop else [])]) == 0
    stored, made = Image.open(image), Image.open(out)
    wanted = {"P": "RGB", "P with transparency": "RGBA", "1": "L"}.get(mode, mode)
    assert made.mode == wanted
    before = np.asarray(stored.convert(wanted) if stored.mode != wanted else stored)
    after = np.asarray(made)
    away = (slice(36, None), slice(0, 40))
    assert np.array_equal(after[away], before[away])
    assert (after[4:12, 70:78] != before[4:12, 70:78]).any()
    if wanted in ("LA", "RGBA"):
        assert np.array_equal(after[..., -1], before[..., -1]), "what is transparent stays so"
    if mode == "I;16":
        assert (after[away] % 257 == 5).all()


def test_formats_that_hold_less_get_what_they_hold_and_profiles_stay(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    graded("RGBA").save(tmp_path / "image.png", icc_profile=profile)
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    for ending, mode in (("jpg", "RGB"), ("webp", "RGBA"), ("bmp", "RGB"), ("tif", "RGBA")):
        out = tmp_path / f"out.{ending}"
        command = ["remove", "--model", tiny_pipe_folder, "--image", tmp_path / "image.png", "--mask",
                   tmp_path / "mask.png", "--out", out, "--steps", "1", "--noise-strength", "1"]  # fmt: skip
        assert main(list(map(str, command))) == 0
        made = Image.open(out)
        assert made.mode == mode
        assert ending == "bmp" or made.info["icc_profile"] == profile


def test_colours_of_half_transparent_pixels_look_on_white_as_they_were_made() -> None:
    from erasure.images import in_mode_of, rgb

    original = graded("RGBA")
    with pytest.warns(UserWarning, match="transparent"):
        seen = np.asarray(rgb(original)).copy()
    seen[20:30, 60:90] = (250, 240, 230)
    made = in_mode_of(original, Image.fromarray(seen))
    with pytest.warns(UserWarning, match="transparent"):
        shown = np.asarray(rgb(made)).astype(int)
    assert np.abs(shown - seen).max() <= 1
    buffer = io.BytesIO()
    made.save(buffer, "PNG")
