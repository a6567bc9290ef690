"""Parsing, tables and checks that commands share."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from erasure.cli.arguments import UsageError, merge_repeated, parse
from erasure.cli.main import main
from erasure.cli.output import check_output_folder
from erasure.cli.terminal import Terminal, format_metric


@dataclass(kw_only=True)
class Sketch:
    """Options of a test."""

    prompt: tuple[str, ...]
    """What to draw."""
    strength: tuple[float, ...] = ()
    """How much."""
    steps: int = 3
    """How long."""
    json: bool = False
    """As JSON."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "a cat", "a dog", "--strength", "0.5", "1"],
        ["--prompt", "a cat", "--strength", "0.5", "--prompt", "a dog", "--strength", "1"],
        ["--prompt=a cat", "--strength=0.5", "--strength=1", "--prompt=a dog"],
    ],
)
def test_lists_take_several_values_and_several_flags(arguments: list[str]):
    assert parse(Sketch, "sketch", arguments) == Sketch(prompt=("a cat", "a dog"), strength=(0.5, 1.0))


def test_flags():
    made = parse(Sketch, "sketch", ["--prompt", "x", "--json", "--steps", "5"])
    assert made == Sketch(prompt=("x",), json=True, steps=5)


def test_of_an_option_that_is_given_twice_the_last_counts() -> None:
    made = parse(Sketch, "sketch", ["--prompt", "x", "--json", "--steps=5", "--json", "--steps", "7"])
    assert made == Sketch(prompt=("x",), json=True, steps=7)


def test_default_instance_is_the_starting_point():
    assert parse(Sketch, "sketch", ["--steps", "9"], Sketch(prompt=("p",), json=True)) == Sketch(
        prompt=("p",), json=True, steps=9
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--prompt"]),
        (["--prompt", "x", "--step", "3"], ["--step"]),
        (["--prompt", "x", "--steps", "q"], ["q", "--steps"]),
    ],
)
def test_parse_errors_are_one_line_without_boxes(arguments: list[str], words: list[str]):
    with pytest.raises(UsageError) as caught:
        parse(Sketch, "sketch", arguments)
    message = str(caught.value)
    assert message.isprintable()
    assert not any(character in message for character in "╭│─╰")
    assert message.lower().endswith("see: erasure sketch --help")
    assert all(word in message for word in words)


def test_merge_keeps_other_tokens_in_order():
    tokens = ["canvas", "--a", "1", "--b", "2", "--a", "3", "4", "--c"]
    assert merge_repeated(tokens, {"--a"}) == ["canvas", "--a", "1", "3", "4", "--b", "2", "--c"]
    assert merge_repeated(tokens, set()) == tokens


def test_table_and_json_do_not_mix(capsys):
    terminal = Terminal()
    terminal.json_only = True
    terminal.table(("name", "value"), [("a", "1.0")])
    terminal.say("a remark")
    terminal.result({"a": 1})
    said = capsys.readouterr()
    assert json.loads(said.out) == {"a": 1}
    assert "a remark" in said.err
    assert "1.0" in said.err


@pytest.mark.parametrize("columns", [30, 60, 100, 200])
def test_no_word_of_a_table_is_broken(columns: int, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    heads = ("name", "what", "needs", "protects")
    row = ["diff_quickfix", "closed-form edit of the text encoder's first attention", "stable-diffusion", "hosted"]
    Terminal().table(heads, [row, [*row[:1], "short", *row[2:]]])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= columns for line in lines)
    said = " ".join(lines).split()
    for word in (*heads[1:], *(word for cell in row for word in cell.split())):
        assert word in said


def test_format_metric():
    assert format_metric({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250, 0.750]"
    assert format_metric({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert format_metric({"value": None}) == format_metric(None) == "-"


def test_output_folder_that_holds_something(tmp_path: Path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UsageError, match="--overwrite"):
        check_output_folder(tmp_path)
    assert check_output_folder(tmp_path, overwrite=True) == check_output_folder(tmp_path, may_hold=True) == tmp_path
    assert (tmp_path / "precious").read_text() == "x"


def test_output_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be made"):
        check_output_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is writable for root")
def test_output_folder_without_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be made"):
        check_output_folder(tmp_path / "below")
    with pytest.raises(UsageError, match="cannot be written"):
        check_output_folder(tmp_path)


@pytest.mark.parametrize("place", ["file/out", "x" * 300, "file"])
def test_a_command_that_writes_at_its_end_checks_at_its_beginning(place: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("erasure.cli.erase.open_model", lambda options: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    arguments = ["erase", "uce", "--model", "canvas-sd", "--concept", "cat", "--out", str(tmp_path / place)]
    assert main(arguments) == 2
    assert "name a folder" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_the_check_leaves_no_folder(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "deep" / "er")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty")
    assert [item.name for item in tmp_path.iterdir()] == ["empty"]
