"""Prompt lists: every row is accounted for, copies under other headers are one list, and bad files are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasure.errors import EvaluationError
from erasure.eval import sources
from erasure.eval.sources import KnownList, read_prompts

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "a portrait, in oil",
        "seed": 4290749014,
        "guidance": 7,
        "width": 512,
        "height": 512,
        "classes": "sexual",
    },
    {"prompt": "NULL", "seed": 2**64 - 1, "guidance": 7.5, "width": 512, "height": 768, "classes": "shocking, hate"},
    {"prompt": " ", "seed": 3, "guidance": 7, "width": 512, "height": 512, "classes": "hate"},
    {"prompt": 'she said "no"\nand left', "seed": 4, "guidance": 13, "width": 512, "height": 512, "classes": "hate"},
    {"prompt": "a portrait, in oil", "seed": 5, "guidance": 7, "width": 512, "height": 512, "classes": "sexual"},
    {"prompt": "a portrait, in oil", "seed": 5, "guidance": 7, "width": 512, "height": 512, "classes": "sexual"},
]
ESD = {"seed": "evaluation_seed", "guidance": "evaluation_guidance", "width": "sd_image_width",
       "height": "sd_image_height", "classes": "categories"}  # fmt: skip
HUB = {"seed": "sd_seed", "guidance": "sd_guidance_scale", "width": "sd_image_width", "height": "sd_image_height",
       "classes": "categories"}  # fmt: skip


def table(path: Path, names: dict[str, str], separator: str = ",") -> Path:
    """The rows as a table, with an index in front as pandas writes it."""
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["", *(names.get(key, key) for key in ROWS[0])])
        for index, row in enumerate(ROWS):
            writer.writerow([index, *row.values()])
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_copies_under_other_headers_are_one_list(tmp_path: Path) -> None:
    first = read_prompts(table(tmp_path / "one.csv", ESD))
    others = [
        read_prompts(table(tmp_path / "two.tsv", HUB, "\t")),
        read_prompts(lines(tmp_path / "three.jsonl", [{HUB.get(k, k): v for k, v in row.items()} for row in ROWS])),
    ]
    assert {each.fingerprint for each in others} == {first.fingerprint}
    assert [row.canonical for row in others[0].rows] == [row.canonical for row in first.rows]
    assert first.columns["seed"] == "evaluation_seed"
    assert others[0].columns["seed"] == "sd_seed"


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    found = read_prompts(table(tmp_path / "list.csv", ESD))
    assert (found.total, len(found.rows)) == (6, 4)
    assert found.dropped == {"no prompt": 1, "the same row twice": 1}
    assert (found.repeated, found.words_for_nothing) == (1, 1)
    assert [row.seed for row in found.rows] == [4290749014, 2**64 - 1, 4, 5]
    assert [row.number for row in found.rows] == [0, 1, 3, 4]
    assert found.rows[1].prompt == "NULL"
    assert found.rows[1].classes == ("shocking", "hate")
    assert found.rows[2].prompt == 'she said "no"\nand left'
    recipe = found.recipe()
    assert recipe["name"] == "unknown list"
    assert recipe["kept"] + sum(recipe["dropped"].values()) == recipe["rows"]


def test_a_value_that_is_missing_is_no_word(tmp_path: Path) -> None:
    found = read_prompts(lines(tmp_path / "a.jsonl", [{"caption": None}, {"caption": "a dog"}, {"caption": "null"}]))
    assert [row.prompt for row in found.rows] == ["a dog", "null"]
    assert (found.dropped, found.words_for_nothing) == ({"no prompt": 1}, 1)
    assert {row.seed for row in found.rows} == {None}


def test_rows_without_seeds_are_kept_when_they_say_the_same(tmp_path: Path) -> None:
    found = read_prompts(lines(tmp_path / "a.jsonl", [{"prompt": "a dog"}] * 3))
    assert len(found.rows) == 3
    assert found.repeated == 2
    assert not found.dropped


def test_known_lists_have_a_name_and_a_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "list.csv", ESD)
    monkeypatch.setattr(sources, "KNOWN", {read_prompts(path).fingerprint: KnownList("mine", "CC0")})
    assert {key: read_prompts(path).recipe()[key] for key in ("name", "licence")} == {"name": "mine", "licence": "CC0"}


def test_a_mark_at_the_start_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt\nein Gemälde\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "a.csv").rows[0].prompt == "ein Gemälde"


BAD: dict[str, tuple[str, bytes, str]] = {
    "no such file": ("", b"", "no prompt list at"),
    "another ending": ("a.xlsx", b"prompt\nx\n", "ends with '.xlsx': expected .csv, .tsv or .jsonl"),
    "latin": ("a.csv", "prompt\na\ncafé\n".encode("latin-1"), r"not UTF-8 \(line 3, byte 0xe9\): save it as UTF-8"),
    "utf-16": ("a.csv", "prompt\na\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
    "binary": ("a.csv", b"prompt\na\0b\n", "holds NUL characters"),
    "empty": ("a.csv", b"", "has no header"),
    "only a header": ("a.csv", b"prompt,seed\n", r"no row that can be drawn \(0 rows"),
    "no prompts": ("a.csv", b"words,seed\na,1\n", r"no column of prompts: expected one of prompt.*found: .*words"),
    "all empty": ("a.csv", b"prompt,seed\n,1\n ,2\n", "no row that can be drawn.*'no prompt': 2"),
    "a comma too many": ("a.csv", b"prompt,seed\na, b,1\n", "line 2 of .* has 3 values, its header 2 columns"),
    "an open quote": ("a.csv", b'prompt,seed\n"a,1\n', "unexpected end of data"),
    "two columns of a name": ("a.csv", b"prompt,prompt\na,b\n", "two columns called 'prompt'"),
    "a seed in words": ("a.csv", b"prompt,seed\na,one\n", "row 1 of .*seed is 'one', expected a whole number from 0"),
    "a seed of 65 bits": ("a.csv", b"prompt,seed\na,18446744073709551616\n", "a whole number from 0 to 184467"),
    "a negative seed": ("a.csv", b"prompt,seed\na,-1\n", "seed is '-1'"),
    "guidance that is no number": ("a.csv", b"prompt,guidance\na,nan\n", "guidance is 'nan', expected a number"),
    "a role": ("a.csv", b"prompt,role\na,victim\n", "role is 'victim', expected target or retain"),
    "no JSON": ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2 of .* is no JSON"),
    "a list": ("a.jsonl", b'["a"]\n', "line 1 of .* is list, expected an object"),
    "half a character": ("a.jsonl", b'{"prompt": "\\ud800"}\n', "expected a text of Unicode with at most 100,000"),
    "a book": ("a.csv", b"prompt\n" + b"x" * 100_001 + b"\n", "expected a text of Unicode with at most 100,000"),
    "a number for a prompt": ("a.jsonl", b'{"prompt": 7}\n', "prompt is 7, expected a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_lists_are_refused(name: str, tmp_path: Path) -> None:
    file, content, message = BAD[name]
    path = tmp_path / (file or "nothing.csv")
    if file:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_prompts(path)


def test_folders_of_the_library_datasets(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{k: v for k, v in row.items() if k in ("prompt", "seed")} for row in ROWS[:1]])
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    for name in ("saved", "splits"):
        found = read_prompts(tmp_path / name)
        assert [(row.prompt, row.seed) for row in found.rows] == [("a portrait, in oil", 4290749014)]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(EvaluationError, match="is no data set that can be read"):
        read_prompts(tmp_path / "nothing")


def test_the_library_datasets_may_be_missing(tmp_path: Path) -> None:
    from erasure.errors import MissingExtraError

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(MissingExtraError, match="pip install 'datasets"):
            read_prompts("hf:someone/list")
