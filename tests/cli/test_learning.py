"""`erasure learn`, and what it makes in the commands that draw and erase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasure.cli.main import main
from tests.learning.conftest import mask, picture

QUICK = (
    "--steps", "2", "--batch", "2", "--vectors", "2", "--prior-batch", "1", "--prior-prompts", "1",
    "--prior-steps", "2", "--device", "cpu",
)  # fmt: skip
PAIR = ("robot", "cactus")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture of two things, and their masks."""
    folder = tmp_path_factory.mktemp("drawn")
    picture(*PAIR).save(folder / "both.png")
    for number in range(2):
        mask(number, *PAIR).save(folder / f"mask-{number}.png")
    return folder


@pytest.fixture(scope="module")
def both(tiny_pipe_folder: Path, drawn: Path) -> Path:
    """`<a>` and `<b>`, learned by the command."""
    assert learn(tiny_pipe_folder, drawn, "--out", str(drawn / "both")) == 0
    return drawn / "both"


def learn(model: Path, drawn: Path, *more: str, tokens: tuple[str, ...] = ("<a>", "<b>")) -> int:
    masks = [str(drawn / f"mask-{number}.png") for number in range(2)]
    given = ["--image", str(drawn / "both.png"), "--token", *tokens, "--mask", *masks]
    return main(["learn", "--model", str(model), *given, *QUICK, *more])


def test_learned_tokens_are_drawn_and_erased(tiny_pipe_folder: Path, both: Path, tmp_path: Path, capsys: Any) -> None:
    assert not both.with_name("both.training").joinpath("training.ckpt").exists()
    model = ["--model", str(tiny_pipe_folder), "--device", "cpu", "--learned", str(both)]
    out = tmp_path / "no-a"
    assert main(["erase", "uce", *model, "--concept", "<a>", "--vocabulary", "4", "--out", str(out), "--json"]) == 0
    said = capsys.readouterr()
    assert "taken for" not in said.err, "what was learned is known"
    (concept,) = json.loads(said.out)["concepts"]
    assert (concept["target"], concept["retain"]) == ("<a>", ["<b>"])
    draw = [
        "generate",
        *model,
        "--erasure",
        str(out),
        "--prompt",
        "a <a>",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "i"),
    ]
    assert main(draw) == 0


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "a photo of <a>", "--steps", "2"),
        ("erase", "uce", "--concept", "<a>"),
    ],
    ids=["generate", "erase"],
)
def test_a_token_that_the_model_lacks_is_refused(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: Any, command: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    assert main([*command, "--model", str(tiny_pipe_folder), "--device", "cpu", "--out", str(out)]) == 2
    assert "--learned FOLDER" in capsys.readouterr().err
    assert not list(out.glob("*"))


def test_what_is_no_learned_concept_is_named(tiny_pipe_folder: Path, both: Path, tmp_path: Path, capsys: Any) -> None:
    model = ["--model", str(tiny_pipe_folder), "--device", "cpu"]
    draw = ["generate", *model, "--prompt", "a", "--out", str(tmp_path / "i")]
    assert main([*draw, "--learned", str(tiny_pipe_folder)]) == 2
    assert "a model" in capsys.readouterr().err
    assert main([*draw, "--erasure", str(both)]) == 2
    assert "--learned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--like", "cat"), "1 --like for 2 --token"),
        (("--mask", "missing.png"), "3 --mask for 1 pictures of 2 tokens"),
        (("--sampling", "other"), "sampling"),
        (("--preset", "other"), "preset"),
    ],
    ids=["like", "mask", "option", "preset"],
)
def test_bad_input_is_refused(
    tiny_pipe_folder: Path, drawn: Path, tmp_path: Path, capsys: Any, more: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out"
    assert learn(tiny_pipe_folder, drawn, *more, "--out", str(out)) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_with_something_else_is_left_alone(tiny_pipe_folder: Path, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert learn(tiny_pipe_folder, drawn, "--out", str(tmp_path)) == 2
    assert (tmp_path / "mine.txt").read_text() == "mine"
