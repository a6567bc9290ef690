"""`erasure erase --add-to`, and what `erasure info` shows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasure import Erasure
from erasure.cli.main import main


def erase(model: Path, concept: str, *more: object) -> int:
    return main(["erase", "diff_quickfix", "--model", str(model), "--concept", concept, *map(str, more)])


@pytest.fixture(scope="module")
def cat(tiny_pipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("added") / "cat"
    assert erase(tiny_pipe_folder, "cat", "--vocabulary", 5, "--seed", 3, "--out", folder) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_adds_with_the_options_it_had_and_shows_the_ledger(
    tiny_pipe_folder: Path, cat: Path, tmp_path: Path, capsys: Any
) -> None:
    before = content(cat)
    out = tmp_path / "both"
    assert erase(tiny_pipe_folder, "dog", "--add-to", cat, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seed"] == 3
    assert found["strategy_config"]["vocabulary"] == 5
    assert [each["concepts"] for each in found["requests"]] == [["cat"], ["dog"]]
    assert found["requests"][0]["options"] == {"vocabulary": 5}
    assert content(cat) == before
    assert main(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("request", "vocabulary=5", "dog"))
    assert main(["info", str(out), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["config"]["requests"]) == 2


def test_the_folder_itself_is_replaced_only_if_asked(
    tiny_pipe_folder: Path, cat: Path, tmp_path: Path, capsys: Any
) -> None:
    own = Erasure.load(cat).save(tmp_path / "own")
    before = content(own)
    assert erase(tiny_pipe_folder, "dog", "--add-to", own, "--out", own) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert content(own) == before
    assert erase(tiny_pipe_folder, "dog", "--add-to", own, "--out", own, "--overwrite") == 0
    assert [concept.target for concept in Erasure.load(own).concepts] == ["cat", "dog"]


def test_a_run_that_is_killed_leaves_the_folder_as_it_was(
    tiny_pipe_folder: Path, cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasure.strategies.diff_quickfix import DiffQuickFix

    own = Erasure.load(cat).save(tmp_path / "own")
    before = content(own)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffQuickFix, "fit", killed)
    assert erase(tiny_pipe_folder, "dog", "--add-to", own, "--out", own, "--overwrite") != 0
    assert content(own) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["cat"], "'cat' is erased already"),
        (["dog>cat"], "the anchor 'cat' of 'dog' is erased already"),
        (["dog", "--retain", "cat"], "retains 'cat', which is erased already"),
        (["dog", "--vocabulary", 7], "'vocabulary' is 7; allowed: 5"),
        (["dog", "--vocabulary", 300], "'vocabulary' is 300; allowed: 5"),
        (["dog", "--seed", 0], "the seed is 0; allowed: 3"),
    ],
    ids=str,
)
def test_what_cannot_be_added_is_one_line(
    tiny_pipe_folder: Path, cat: Path, tmp_path: Path, capsys: Any, more: list[object], message: str
) -> None:
    assert erase(tiny_pipe_folder, *more, "--add-to", cat, "--out", tmp_path / "out") == 2  # type: ignore[arg-type]
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_missing_or_damaged_folder_is_said(tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "erasure_config.json").write_text("{")
    for folder in (tmp_path, tmp_path / "missing"):
        assert erase(tiny_pipe_folder, "dog", "--add-to", folder, "--out", tmp_path / "out") == 2
        assert str(folder) in capsys.readouterr().err
