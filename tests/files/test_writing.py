"""Safe names, atomic writing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from erasure import files
from erasure.errors import ArtifactError, EvaluationError, TrainingError
from erasure.files import writing

# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "C:\\x", "a\0b", "a\nb", "\x1b[2J", "a\u202eb",
        "\ud800", "n" * 256, "ü" * 128, "nul", "COM1.txt", "x.", "x ", "a*b", "<script>", 5, None, b"x",
        "../" * 40 + "etc/passwd", "//server/share", "a|b", "con", "LPT9.png",
    ],
)  # fmt: skip
def test_names_from_files_stay_inside(tmp_path: Path, name: Any) -> None:
    with pytest.raises(EvaluationError, match="cannot be the name of a file"):
        files.inside(tmp_path, name, error=EvaluationError)
    with pytest.raises(EvaluationError):
        files.inside(tmp_path, "images", name, error=EvaluationError)


def test_plain_names_are_taken_and_links_followed(tmp_path: Path) -> None:
    for name in ("van-gogh.png", "猫", "a b", "console.txt", ".hidden", "n" * 255, "x..y"):
        assert files.inside(tmp_path, name) == tmp_path / name
    assert files.inside(tmp_path, "images", "0.png") == tmp_path / "images" / "0.png"
    outside = tmp_path / "outside"
    folder = tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (folder / "out").symlink_to(outside)
    (folder / "file").symlink_to("/etc/passwd")
    (folder / "self").symlink_to(".")
    (folder / "loop").symlink_to("loop")
    (folder / "real").mkdir()
    (folder / "within").symlink_to("real")
    for names in (("out",), ("out", "x"), ("file",), ("self",), ("loop",)):
        with pytest.raises(ArtifactError, match="link"):
            files.inside(folder, *names)
    assert files.inside(folder, "within", "x").parent.name == "within"


# Writing -------------------------------------------------------------------------------------------------------------


def test_files_are_whole_and_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        files.write_json(tmp_path / "deep" / "a.json", {"a": [1, "ü"]})
        files.replace_files(tmp_path / "made", {"b": b"1"})
    finally:
        os.umask(old)
    assert files.read_json(tmp_path / "deep" / "a.json", JsonValue) == {"a": [1, "ü"]}
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"deep": 0o700, "a.json": 0o600, "made": 0o700, "b": 0o600}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    path = files.write_text(tmp_path / "a.txt", "old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    expected = TrainingError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        files.write_text(path, "new", error=TrainingError)
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("data", [float("nan"), {"a": float("inf")}, "\ud800", {1, 2}, [10**50]])
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, data: Any) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        files.write_json(tmp_path / "a.json", data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "\ud800", "file/below"])
def test_paths_that_cannot_be_are_named_errors(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for write in (lambda p: files.write_text(p, ""), lambda p: files.replace_files(p, {"a": b""})):
        with pytest.raises(ArtifactError, match="cannot write"):
            write(tmp_path / name)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    dead = tmp_path / f".a.txt.erasure-{writing.HOST}-{killed.pid}-00000000.partial"
    folder = dead.with_name(dead.name.replace("a.txt", "b"))
    alive = tmp_path / f".a.txt.erasure-{writing.HOST}-{os.getpid()}-00000000.partial"
    elsewhere = tmp_path / f".a.txt.erasure-ffffff-{killed.pid}-00000000.partial"
    old = elsewhere.with_name(elsewhere.name.replace("a.txt", "c"))
    folder.mkdir()
    others = [tmp_path / name for name in (".a.partial", "x.erasure-1-2.partial", ".erasure-notes")]
    for path in (dead, folder / "x", alive, elsewhere, old, *others):
        path.touch()
    os.utime(old, (0, 0))
    files.write_text(tmp_path / "a.txt", "new")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.txt", alive.name, elsewhere.name, *(path.name for path in others)}


OLD, NEW = {"a": b"old a", "b": b"old b", "gone": b"old"}, {"a": b"new a", "b": b"new b", "c": b"new c"}
NAMES = ("a", "b", "c", "gone")


def contents_of(folder: Path) -> dict[str, bytes]:
    return files.steady(folder, NAMES, lambda paths: {name: path.read_bytes() for name, path in paths.items()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("existing", [True, False])
def test_killed_at_any_moment_all_files_are_old_or_new(tmp_path: Path, existing: bool) -> None:
    """A child ends at the n-th operation on the disk, with no handler run; then the next write tidies up."""
    ends = []
    for moment in range(1, 60):
        folder = tmp_path / f"{moment}" / "folder"
        folder.parent.mkdir()
        if existing:
            files.replace_files(folder, OLD)
            (folder / ".git").mkdir()
            (folder / "notes").write_text("mine")
        process = os.fork()
        if not process:
            count = 0

            def ending(function: Callable[..., Any], moment: int = moment) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == moment:
                        os._exit(9)
                    return function(*arguments, **options)

                return call

            for owner, name in (
                (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (Path, "mkdir"),
                (Path, "write_bytes"), (Path, "write_text"),
            ):  # fmt: skip
                setattr(owner, name, ending(getattr(owner, name)))
            files.replace_files(folder, NEW, NAMES)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        found = contents_of(folder) if folder.exists() else {}
        assert found in ((OLD, NEW) if existing else ({}, NEW)), moment
        ends.append(found == NEW)
        files.replace_files(folder, NEW, NAMES)
        assert contents_of(folder) == NEW
        mine = {".git", "notes"} if existing else set()
        assert {path.name for path in folder.iterdir()} == {*NEW, *mine}
        assert [path.name for path in folder.parent.iterdir()] == ["folder"]
        if ended == 0:
            break
    assert ended == 0
    assert False in ends
    assert ends.count(True) >= 2


def test_a_journal_from_elsewhere_moves_nothing_else(tmp_path: Path) -> None:
    files.replace_files(tmp_path / "f", OLD)
    (tmp_path / "f" / "notes").write_text("mine")
    journal = tmp_path / "f" / writing.COMMIT
    journal.mkdir()
    (journal / "notes").write_text("theirs")
    (journal / writing.MANIFEST).write_text(json.dumps({"new": ["notes"], "all": ["notes", "a"]}))
    files.replace_files(tmp_path / "f", NEW, NAMES)
    assert (tmp_path / "f" / "notes").read_text() == "mine"
    journal.mkdir()
    for names in (["../x"], ["/etc/passwd"], [""], ["a\\b"]):
        (journal / writing.MANIFEST).write_text(json.dumps({"new": names, "all": names}))
        with pytest.raises(ArtifactError, match="damaged"):
            contents_of(tmp_path / "f")


def test_a_folder_that_changes_meanwhile_is_read_again(tmp_path: Path) -> None:
    files.replace_files(tmp_path / "f", OLD)
    calls = []

    def read(paths: dict[str, Path]) -> dict[str, bytes]:
        first = {"a": paths["a"].read_bytes()}
        if not calls:
            files.replace_files(tmp_path / "f", NEW, NAMES)
        calls.append(1)
        return {**first, **{name: path.read_bytes() for name, path in paths.items() if name != "a" and path.exists()}}

    assert files.steady(tmp_path / "f", NAMES, read) == NEW
    assert len(calls) == 2


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    def stop() -> None:
        with files.new_folder(tmp_path / "link") as folder:
            (folder / "a").touch()
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert not list((tmp_path / "real").iterdir())
    with files.new_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").exists()
    with pytest.raises(ArtifactError, match="not empty"), files.new_folder(tmp_path / "real"):
        pass
