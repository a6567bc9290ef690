"""`erasure studio`: what it refuses to start with."""

from __future__ import annotations

import socket
import sys

import pytest

from erasure.cli.main import main

pytest.importorskip("fastapi", reason="extra serve is not installed")
pytest.importorskip("uvicorn", reason="extra serve is not installed")


def test_what_it_does_not_start_with(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: str) -> str:
        assert main(["studio", *words]) == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "another program has it" in said("--port", str(taken.getsockname()[1]))
    assert "give a port from 0 to 65535" in said("--port", "70000")
    assert "max_queue" in said("--max-queue", "0")
    assert "--share" in said("--share")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'gradio>=6'" in said("--port", "0")
