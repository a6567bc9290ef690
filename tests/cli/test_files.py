"""What commands say of files and numbers that cannot be, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasure.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.startswith("erasure: error: ")
    return said


def test_output_folders_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for out, said in ((tmp_path / ("x" * 300), "too long"), (tmp_path / "file", "is a file"),
                      (tmp_path / "link", "is a file"), (tmp_path / "file" / "out", "cannot be made")):  # fmt: skip
        assert said in refused(capsys, "generate", "--model", "none", "--prompt", "a cat", "--out", out)
        assert said in refused(capsys, "eval", "canvas", "--model", "none", "--concept", "cat", "--out", out)
    assert (tmp_path / "file").read_text() == "mine"


def test_seeds_that_no_generator_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("-9223372036854775809", "18446744073709551616", "9" * 40):
        arguments = ["--model", "none", "--seed", seed, "--out", str(tmp_path / "out.png")]
        assert "64 bits" in refused(capsys, "generate", "--prompt", "a cat", *arguments)
        assert "64 bits" in refused(capsys, "remove", "--image", "none.png", "--words", "cat", *arguments)


def test_images_replace_links_and_do_not_follow_them(tiny_pipe_folder: Path, tmp_path: Path) -> None:
    private, out = tmp_path / "private", tmp_path / "out"
    private.write_text("mine")
    out.mkdir()
    (out / "000-a-cat-0.png").symlink_to(private)
    arguments = ["--model", tiny_pipe_folder, "--prompt", "a cat", "--steps", "1", "--out", out, "--overwrite"]
    assert main(["generate", *map(str, arguments)]) == 0
    assert private.read_text() == "mine"
    assert (out / "000-a-cat-0.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"schema_version": 1}')
    assert "is missing" in refused(capsys, "compare", tmp_path)
    assert "no results at" in refused(capsys, "compare", tmp_path / "nothing")
