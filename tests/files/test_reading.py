"""Bounded reading."""

from __future__ import annotations

import json
import os
import socket
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
