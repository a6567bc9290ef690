"""Commands that are refused, however late, make no folder for their results."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NoReturn

import pytest

from erasure.cli.main import main
from erasure.errors import EvaluationError, UnsupportedModelError
from erasure.files import held, write_bytes

MODEL = ("--model", "none")
COMMANDS = {
    "attack": ("attack", "random_prefix", *MODEL, "--concept", "cat"),
    "audit": ("audit", *MODEL, "--erasure", "some"),
    "demo": ("demo",),
    "erase": ("erase", "uce", *MODEL, "--concept", "cat"),
    "eval": ("eval", "canvas", *MODEL, "--concept", "cat"),
    "generate": ("generate", *MODEL, "--prompt", "a cat"),
    "learn": ("learn", *MODEL, "--image", "cat.png", "--token", "<cat>"),
    "remove_folder": ("remove", *MODEL, "--image", ".", "--words", "cat"),
    "sae": ("sae", "train", *MODEL),
    "stress": ("stress", "noise", *MODEL, "--erasure", "some"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_is_refused_leaves_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise UnsupportedModelError("the model is refused")

    module = importlib.import_module(f"erasure.cli.{name}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").touch()
    if name == "remove_folder":
        monkeypatch.setattr("erasure.cli.remove.load_erasures", lambda options: {})
        monkeypatch.setattr("erasure.cli.remove.open_model", refuse)
    else:
        monkeypatch.setattr(module, "open_model", refuse)
    if hasattr(module, "load_erasures"):
        monkeypatch.setattr(module, "load_erasures", lambda options: {})
    assert main([*COMMANDS[name], "--out", str(tmp_path / "deep" / "er")]) == 2
    assert "the model is refused" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


@pytest.mark.parametrize(
    "command", [("attack", "random_prefix"), ("stress", "noise"), ("eval",)], ids=lambda words: str(words[0])
)
def test_a_suite_that_is_refused_leaves_no_folder(
    command: tuple[str, ...], tiny_pipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, given = tmp_path / "out", ("--model", str(tiny_pipe_folder), "--concept", "cat")
    if command[0] == "stress":
        monkeypatch.setattr("erasure.cli.stress.load_erasures", lambda options: {})
        given = (*given, "--erasure", "some", "--suite", "i2p")
    elif command[0] == "attack":
        given = (*given, "--suite", "i2p")
    else:
        given = ("i2p", *given)
    assert main([*command, *given, "--size", "smoke", "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("erasure: error: ")
    assert not out.exists()


def test_work_that_is_refused_before_it_writes_leaves_no_folder(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "deep" / "er", {"size": "quick"}

    def work(*written: str) -> None:
        with held(folder, recipe, file="recipe.json", what="evaluation", beside=None, error=EvaluationError):
            for name in written:
                write_bytes(folder / name, b"x", error=EvaluationError)
            raise EvaluationError("refused")

    with pytest.raises(EvaluationError, match="refused"):
        work()
    assert not list(tmp_path.iterdir())
    with pytest.raises(EvaluationError, match="refused"):
        work("samples.jsonl")
    assert (folder / "samples.jsonl").is_file()
    assert (folder / "recipe.json").is_file()
    (folder / "samples.jsonl").unlink()
    with pytest.raises(EvaluationError, match="refused"):  # a folder that was there stays
        work()
    assert (folder / "recipe.json").is_file()
