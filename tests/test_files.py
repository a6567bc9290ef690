"""Bounded reading, atomic writing, safe names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from safetensors.torch import save_file

from erasure import files
from erasure.errors import ArtifactError, EvaluationError, TrainingError
from erasure.files import writing


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    size: int = 0


# Reading -------------------------------------------------------------------------------------------------------------


def device(path: Path) -> Path:
    return Path("/dev/zero")


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def a_socket(path: Path) -> Path:
    socket.socket(socket.AF_UNIX).bind(str(path))
    return path


def huge(path: Path) -> Path:
    path.touch()
    os.truncate(path, 4 * 2**30)
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "No such file"),
        (device, "is a device"),
        (pipe, "is a named pipe"),
        (a_socket, "is a socket"),
        (lambda path: path.parent, "is a folder"),
        (huge, r"4,294,967,296 bytes"),
        (loop, "symbolic links"),
        (lambda path: path.with_name("n" * 300), "name too long"),
        (lambda path: f"{path}\0", "cannot be the path"),
        (lambda path: f"{path}\ud800", "cannot be the path"),
    ],
)
def test_only_regular_files_of_a_sane_size_are_read(
    tmp_path: Path, make: Callable[[Path], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    started = time.monotonic()
    path = make(Path("file")) if make is a_socket else make(tmp_path / "file")
    for read in (files.read_bytes, files.read_text, lambda p: files.read_json(p, JsonValue), files.read_tensors):
        if make is huge and read is files.read_tensors:
            message = "a header of 0 bytes"
        with pytest.raises(ArtifactError, match=f"(?i){message}"):
            read(path)
    with pytest.raises(EvaluationError):
        files.read_bytes(path, error=EvaluationError)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 5000 + b"]" * 5000, "recursion limit"),
        (b'{"a":' * 5000, "recursion limit"),
        (b"9" * 5000, "out of range"),
        (b"[" + b"9" * 41 + b"]", "41 digits"),
        (b'"\\ud800"', "escape"),
        (b"NaN", "not finite"),
        (b"[-Infinity]", "not finite"),
        (b"1e999", "not finite"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b'{"b": {"a": 1, "a": 2}}', "'a' comes twice"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"{} {}", "trailing"),
    ],
)
def test_json_that_hurts_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        files.read_json(path, JsonValue)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "a", "sise": 3}', r"unknown keys \['sise'\]; allowed: \['name', 'size'\]"),
        ("{}", "key 'name' is missing"),
        ('{"name": 1}', "'name'.*found 1"),
        ('{"name": "a", "size": true}', "'size'.*found True"),
        ('{"name": "a", "size": "1"}', "'size'"),
        ('{"name": "a", "size": 1.0}', "'size'"),
        ('["name"]', "found"),
    ],
)
def test_a_schema_is_strict_and_says_what_it_knows(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        files.read_json(path, Row)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ArtifactError, match=message):
        files.validated(json.loads(content), Row, "here")
    path.write_text(json.dumps({"rows": [json.loads(content)]}))
    with pytest.raises(ArtifactError, match=r"rows\.0|allowed: \['name', 'size'\]"):
        files.read_json(path, dict[str, list[Row]])


def test_long_texts_are_cut_and_control_characters_escaped() -> None:
    assert files.shown("\x1b[31m\u202e\x9b") == r"'\x1b[31m\u202e\x9b'"
    assert len(files.shown("x" * 2_000_000)) < 100
    with pytest.raises(ArtifactError) as caught:
        files.validated({"name": "a", "x" * 10**6: 1, "size": "\x1b" * 10**6}, Row, "here")
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_lines_of_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a"}\n\n{"name": "b", "size": 2}\n{"name": "c')
    assert [row.name for row in files.read_lines(path, Row, torn=True)] == ["a", "b"]
    with pytest.raises(ArtifactError, match="line 4"):
        list(files.read_lines(path, Row))
    path.write_text('{"name": "a"\n{"name": "b"}\n')
    with pytest.raises(ArtifactError, match="line 1"):
        list(files.read_lines(path, Row, torn=True))
    path.write_text('{"name": "' + "a" * 100 + '"}\n')
    with pytest.raises(ArtifactError, match=r"line 1.*50 bytes"):
        list(files.read_lines(path, Row, line_limit=50))
    path.write_text('{"name": "a"}\n' * 4)
    with pytest.raises(ArtifactError, match="line 4"):
        list(files.read_lines(path, Row, count=3))


# Tensors -------------------------------------------------------------------------------------------------------------


def header_of(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    content = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = {
        "a": torch.randn(3, 4), "b": torch.tensor([True, False, True]), "c": torch.randn(2).bfloat16(),
        "d": torch.zeros(0, 3), "e": torch.tensor(5), "f": torch.randn(1, 2, 3).half(),
    }  # fmt: skip
    save_file(made, tmp_path / "t", metadata={"format": "pt"})
    assert {name: info.shape for name, info in files.tensor_infos(tmp_path / "t").items()} == {
        name: tensor.shape for name, tensor in made.items()
    }
    read = files.read_tensors(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"")  # the tensors are not the file's
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in made.items())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(shape=(40_000, 30_000), offsets=(0, 4_800_000_000))}, b"1234", "its header tells of"),
        ({"a": entry(shape=(40_000, 30_000))}, b"1234", "does not fill"),
        ({"a": entry(shape=(2**40, 2**40))}, b"1234", "does not fill"),
        ({"a": entry(shape=(-1,))}, b"1234", "greater than or equal to 0"),
        ({"a": entry(shape=[1] * 100)}, b"1234", "at most 8"),
        ({"a": entry(offsets=(4, 8))}, b"12345678", "does not fill"),
        ({"a": entry(), "b": entry()}, b"1234", "does not fill"),
        ({"a": entry()}, b"12345678", "its header tells of"),
        ({"a": entry("F8_E4M3", (4,))}, b"1234", "type F8_E4M3, allowed"),
        ({"a": entry("C64", (1,), (0, 8))}, b"12345678", "type C64, allowed"),
        ({"a": entry("\x1b[2J")}, b"1234", "pattern"),
        ({"a\u202e": entry()}, b"1234", "pattern"),
        ({"n" * 10_000: entry()}, b"1234", "512"),
        ({"a": {**entry(), "more": 1}}, b"1234", "unknown keys"),
        ({"a": [1]}, b"1234", "object"),
        ([], b"", "object"),
        (b"[" * 5000, b"", "recursion"),
        ({f"a{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(30_000)}, b"", "more than 20,000 tensors"),
    ],
)
def test_headers_are_checked_before_anything_is_allocated(
    tmp_path: Path, header: Any, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = header_of(tmp_path / "t.safetensors", header, data)
    monkeypatch.setattr(torch, "frombuffer", None)
    with pytest.raises(ArtifactError, match=message):
        files.read_tensors(path)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_the_length_of_a_header_is_bounded(tmp_path: Path, length: int) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        files.read_tensors(header_of(tmp_path / "t", {"a": entry()}, b"1234", length))


def test_shapes_may_be_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "t")

    def refuse(infos: Any) -> None:
        assert infos["a"].shape == (3,)
        raise TrainingError("too wide")

    monkeypatch.setattr(torch, "frombuffer", None)
    with pytest.raises(TrainingError, match="too wide"):
        files.read_tensors(tmp_path / "t", check=refuse)
    with pytest.raises(ArtifactError, match="type F32, allowed: I64"):
        files.read_tensors(tmp_path / "t", allowed_dtypes=(torch.int64,))


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
