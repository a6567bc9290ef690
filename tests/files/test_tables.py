"""Lists of every room that reads some: what editors, spreadsheets and shells write is read, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from erasure import files
from erasure.cli.lists import read_concepts
from erasure.cli.lists import read_prompts as read_prompts_to_draw
from erasure.errors import ArtifactError, ErasureError
from erasure.eval.attacks.rewrites import read_rewrites
from erasure.eval.sources import read_prompts as read_prompts_to_measure
from erasure.eval.sweeps.plan import SweepPlan
from erasure.sae.formats import read_prompts as read_prompts_to_train
from erasure.strategies.prompts import listed_scenes

READERS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "strategies": ("prompt", lambda path: [scene.prompt for scene in listed_scenes(str(path))]),
    "autoencoders": ("prompt", read_prompts_to_train),
    "rewrites": ("rewrite", lambda path: [one.rewrite for one in read_rewrites(path)]),
    "drawing": ("prompt", lambda path: [row.prompt for row in read_prompts_to_draw(path)]),
    "measuring": ("prompt", lambda path: [row.prompt for row in read_prompts_to_measure(path).rows]),
    "concepts": ("concept", lambda path: [str(one) for one in read_concepts(path)]),
}
LINES = [name for name in READERS if name != "measuring"]
"""Rooms that read a text with one entry on each line."""


@pytest.mark.parametrize("room", READERS)
def test_a_table_of_a_spreadsheet_is_read(room: str, tmp_path: Path) -> None:
    column, read = READERS[room]
    path = tmp_path / "LIST.CSV"
    path.write_bytes(f'\ufeff{column}\r\n"a cat, white"\r\n\r\na dog\r\n'.encode())
    assert read(path) == ["a cat, white", "a dog"]


@pytest.mark.parametrize("room", READERS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{0}\na cat, white\n", "cells|values"),
        ('{0}\n"a cat\na dog\n', "unexpected end of data"),
        ("{0},{0}\na cat,a dog\n", "two columns called"),
        ("other\na cat\n", "column"),
    ],
    ids=["a comma without quotes", "a quote that is not closed", "a column twice", "another column"],
)
def test_a_table_that_could_be_misread_is_refused(room: str, rows: str, message: str, tmp_path: Path) -> None:
    column, read = READERS[room]
    path = tmp_path / "list.csv"
    path.write_text(rows.format(column))
    with pytest.raises(ErasureError, match=message):
        read(path)


@pytest.mark.parametrize("room", [name for name in READERS if name != "measuring"])
def test_a_cell_without_end_is_refused(room: str, tmp_path: Path) -> None:
    column, read = READERS[room]
    path = tmp_path / "list.csv"
    path.write_text(f'{column}\n"{"a" * 200_000}"\n')
    with pytest.raises(ErasureError, match="larger than field limit"):
        read(path)


@pytest.mark.parametrize("room", READERS)
@pytest.mark.parametrize(
    ("coding", "message"), [("utf-16", "is UTF-16: save|is UTF-16; save"), ("latin-1", "not UTF-8"), ("nul", "NUL")]
)
def test_another_encoding_is_told_as_what_it_is(room: str, coding: str, message: str, tmp_path: Path) -> None:
    column, read = READERS[room]
    path = tmp_path / "list.csv"
    text = f"{column}\ncaf\xe9\n"
    path.write_bytes(text.replace("\xe9", "\0").encode() if coding == "nul" else text.encode(coding))
    with pytest.raises(ErasureError, match=message):
        read(path)


@pytest.mark.parametrize("room", LINES)
def test_lines_end_at_line_breaks_only(room: str, tmp_path: Path) -> None:
    _, read = READERS[room]
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cat\u2028in\x85 blue\r\na dog\ra house\n".encode())
    assert [" ".join(each.split()) for each in read(path)] == ["a cat in blue", "a dog", "a house"]


def test_lines_of_json_end_at_line_breaks_only(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text("\ufeff" + json.dumps({"prompt": "a cat\u2028in blue"}, ensure_ascii=False) + "\n")
    for room in ("drawing", "measuring"):
        assert [" ".join(each.split()) for each in READERS[room][1](path)] == ["a cat in blue"]


@pytest.mark.parametrize("room", ["strategies", "autoencoders"])
def test_json_is_not_taken_for_a_text(room: str, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "a cat"}\n')
    with pytest.raises(ErasureError, match="is JSON; expected one prompt on each line"):
        READERS[room][1](path)


def test_a_byte_order_mark_is_no_part_of_json_and_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf[1]\n")
    assert files.read_json(path, list[int]) == [1]
    assert list(files.read_lines(path, list[int])) == [[1]]
    plan = 'models = ["canvas-sd"]\nconcepts = ["cat"]\nsuites = ["canvas"]\n[[methods]]\nstrategy = "uce"\n'
    path.write_bytes(b"\xef\xbb\xbf" + plan.encode())
    with_mark = _told(path)
    path.write_text(plan)
    assert with_mark == _told(path)


def _told(path: Path) -> str:
    try:
        return str(SweepPlan.read(path))
    except ErasureError as error:
        return str(error)


def test_names_of_columns_and_cells_come_as_they_are() -> None:
    names, rows = files.read_table(" a ,b\n1, 2 \n\n3,4\n", "x.csv", ",", column=str.strip)
    assert (names, list(rows)) == (["a", "b"], [(2, {"a": "1", "b": " 2 "}), (4, {"a": "3", "b": "4"})])
    with pytest.raises(ArtifactError, match=r"x\.csv, line 3 has 1 cells"):
        list(files.read_table("a,b\n1,2\n3\n", "x.csv", ",")[1])
