"""Every change of an audit log but a cut at its end is found in the log itself, and that one by its last digest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from erasure.cli.main import main
from erasure.errors import ArtifactError
from erasure.locking import AuditLog, find, verify_log

KEY = b"a secret of sixteen bytes or more"


@pytest.fixture(params=[None, KEY], ids=["plain", "keyed"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    return request.param


@pytest.fixture
def path(tmp_path: Path, key: bytes | None) -> Path:
    """A log of six lines."""
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file, key=key)
    for number in range(5):
        log.write("drawn", prompts=log.as_logged([f"a photo of number {number}"]), seconds=0.5)
    log.close()
    return file


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def complaint(read: Any, path: Path, key: bytes | None) -> str:
    """What is said of a log; empty where nothing is wrong with it."""
    try:
        read(path, key=key)
    except ArtifactError as error:
        return str(error)
    return ""


def test_a_whole_log_is_whole_and_knows_its_prompts(path: Path, key: bytes | None) -> None:
    told = verify_log(path, key=key)
    assert (told.lines, told.events, told.keyed, told.torn) == (6, {"opened": 1, "drawn": 5}, key is not None, 0)
    assert verify_log(path, key=key, head=told.head) == told
    assert find(path, "a photo of number 3", key=key) == [5]
    assert find(path, "a photo of another", key=key) == []
    assert "photo" not in path.read_text()


def test_every_line_that_is_removed_moved_or_changed_is_noticed(path: Path, key: bytes | None) -> None:
    whole = lines_of(path)
    damaged = {f"without {place + 1}": whole[:place] + whole[place + 1 :] for place in range(5)}
    damaged |= {f"swapped {place + 1}": [*whole[:place], whole[place + 1], whole[place], *whole[place + 2 :]]
                for place in range(5)}  # fmt: skip
    damaged |= {f"twice {place + 1}": whole[: place + 1] + whole[place:] for place in range(6)}
    for place, line in enumerate(whole):
        for old, new in (('"event": "', '"event": "x'), ('"n": ', '"n": 1'), ("Z", "Y"), ("}", ', "more": 1}')):
            damaged[f"{place + 1}: {old}"] = [*whole[:place], line.replace(old, new, 1), *whole[place + 1 :]]
    damaged["no JSON inside"] = [*whole[:2], "nothing\n", *whole[2:]]
    for what, lines in damaged.items():
        path.write_text("".join(lines))
        for read in (verify_log, AuditLog):
            assert re.search(r"line \d+ of", complaint(read, path, key)), what


def test_lines_that_are_missing_at_the_end_are_told_by_the_last_digest(path: Path, key: bytes | None) -> None:
    head = verify_log(path, key=key).head
    path.write_text("".join(lines_of(path)[:-1]))
    assert verify_log(path, key=key).lines == 5
    with pytest.raises(ArtifactError, match="lines at its end were removed"):
        verify_log(path, key=key, head=head)


def test_a_chain_without_the_secret_does_not_hold(path: Path, key: bytes | None) -> None:
    wrong = KEY if key is None else b"another secret of sixteen bytes"
    with pytest.raises(ArtifactError, match=r"line 1 of .* the key is another one"):
        verify_log(path, key=wrong)
    if key is not None:
        with pytest.raises(ArtifactError, match="line 1 of"):
            verify_log(path)
    with pytest.raises(ArtifactError, match="has 5 bytes"):
        verify_log(path, key=b"short")


def test_goes_on_where_it_ended_also_behind_a_line_that_was_cut_short(path: Path, key: bytes | None) -> None:
    with open(path, "a") as file:
        file.write('{"n": 7, "ti')
    with pytest.raises(ArtifactError, match="cut short"):
        verify_log(path, key=key)
    log = AuditLog(path, key=key)
    log.write("drawn", prompts=log.as_logged(["a photo of number 3"]))
    assert log.lines == 8
    log.close()
    told = verify_log(path, key=key)
    assert (told.lines, told.torn, told.events["resumed"]) == (8, 1, 1)
    assert told.head == log.head
    assert find(path, "a photo of number 3", key=key) == [5, 9]
    lines = lines_of(path)
    path.write_text("".join([*lines[:6], '{"n": 7, "other\n', *lines[7:]]))
    with pytest.raises(ArtifactError, match="line 7 of"):
        verify_log(path, key=key)


def test_threads_share_one_log_and_processes_do_not(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    threads = [threading.Thread(target=lambda: [log.write("drawn") for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other = f"from erasure.locking import AuditLog\nAuditLog({str(path)!r})"
    ended = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
    assert "another process writes the audit log" in ended.stderr
    log.close()
    assert verify_log(path).lines == 401


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", prompts="none")
    assert log.as_logged(["a cat"]) is None
    with pytest.raises(ArtifactError, match="field 'hash' of its own"):
        log.write("drawn", hash="x")
    with pytest.raises(ArtifactError, match="too long"):
        log.write("drawn", text="x" * 2**21)
    log.close()
    with pytest.raises(ArtifactError, match="cannot be written"):
        log.write("drawn")
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(ArtifactError, match=r"cannot be (written|read)|holds no line"):
            AuditLog(full)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="cannot be"):
        AuditLog(tmp_path / "folder")


def test_prompts_stand_in_clear_where_told(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", prompts="clear")
    log.write("drawn", prompts=log.as_logged(["a \ud800 cat\n"]))
    log.close()
    (line,) = find(log.path, "a \ud800 cat\n")
    assert json.loads(lines_of(log.path)[line - 1])["prompts"] == ["a \ud800 cat\n"]


def test_the_command_checks_a_log(
    path: Path, key: bytes | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None:
        monkeypatch.setenv("ERASURE_AUDIT_KEY", key.decode())
    head = verify_log(path, key=key).head
    assert main(["log", str(path), "--head", head, "--prompt", "a photo of number 1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["lines"], told["head"], told["about_the_prompt"]) == (6, head, [3])
    assert main(["log", str(path)]) == 0
    assert ("Written without a secret" in capsys.readouterr().out) == (key is None)
    path.write_text("".join(lines_of(path)[1:]))
    assert main(["log", str(path)]) == 2
    assert "line 1 of" in capsys.readouterr().err
    assert main(["log", str(path) + ".not"]) == 2
    assert "cannot be read" in capsys.readouterr().err
