"""`erasure audit`: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasure.cli.main import main
from erasure.eval.audits import runner


def broken(*args: Any, **more: Any) -> Any:
    raise RuntimeError("out of memory")


def test_a_part_that_fails_is_told_and_is_the_exit_code(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made, out = str(tiny_pipe_folder), str(tmp_path / "cat"), tmp_path / "card"
    assert main(["erase", "uce", "--model", model, "--concept", "cat", "--vocabulary", "0", "--out", made]) == 0
    monkeypatch.setattr(runner, "attack", broken)
    command = ["audit", "--model", model, "--erasure", made, "--attacks", "synonym", "--stress", "none"]
    capsys.readouterr()
    assert main([*command, "--size", "smoke", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "1 parts failed (attack-synonym)" in said.err
    assert "refused" in said.out, "the suites of the embedded world do not judge this model"
    assert "out of memory" in (out / "report.html").read_text()
    # The same command again goes on, here with the part that had failed, and ends as it should.
    monkeypatch.undo()
    code = main([*command, "--size", "smoke", "--out", str(out), "--json"])
    data = json.loads(capsys.readouterr().out)
    states = {part["folder"]: part["state"] for part in data["parts"]}
    assert code == 0
    assert set(states.values()) == {"refused"}
    assert data["grades"]["weights"] == "not measured"


def test_what_leaves_out_everything_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["audit", "--model", "canvas-sd", "--erasure", "e", "--out", "o", "--stress", "none", "strength"]
    assert main(command) == 2
    assert "leaves out everything" in capsys.readouterr().err
    assert main([*command[:-2], "quantize"]) == 2
    assert "quantise" in capsys.readouterr().err
