"""`erasure serve`: what it refuses to start with, and that it ends without losing what it accepted."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from erasure import extras
from erasure.cli.arguments import UsageError
from erasure.cli.main import main
from erasure.cli.serve import named_detector
from erasure.errors import ErasureError, MissingExtraError
from erasure.locking import verify_log

pytest.importorskip("fastapi", reason="extra serve is not installed")
pytest.importorskip("uvicorn", reason="extra serve is not installed")


@pytest.fixture(scope="module")
def model(tiny_pipe_folder: Path) -> str:
    return str(tiny_pipe_folder)


@pytest.fixture(scope="module")
def cat(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("serve") / "cat")
    assert main(["erase", "uce", "--model", model, "--concept", "cat", "--vocabulary", "8", "--out", folder]) == 0
    return folder


def test_what_it_does_not_start_with(
    model: str, cat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> str:
        assert main(["serve", "--model", model, *words]) == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "another program has it: stop that, give another --port" in said("--erasure", cat, "--port", port)
    assert "give a port from 0 to 65535" in said("--port", "70000")
    assert "no erasure is in force" in said("--port", "0")
    assert "has gates that tell concepts" in said("--erasure", cat, "--port", "0", "--check-prompts")
    assert "name one with --detector" in said("--detector-option", "threshold=0.5")
    assert "max_queue" in said("--erasure", cat, "--port", "0", "--max-queue", "0")
    assert "2 --strength for 1" in said("--erasure", cat, "--strength", "1", "1")
    assert "nsfwjs" in said("--erasure", cat, "--port", "0", "--detector", "nsfwj")
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert "other.jsonl" in said("--erasure", cat, "--port", "0", "--audit", str(tmp_path / "other.jsonl"))

    def missing(module: str) -> Any:
        raise MissingExtraError(f"{module} cannot be imported; install it with: pip install '{module}'")

    monkeypatch.setattr(extras, "require", missing)
    assert "pip install 'fastapi'" in said("--erasure", cat, "--port", "0")


def test_detectors_are_told_their_options() -> None:
    detector = named_detector("nsfwjs", ["threshold=0.7"])
    assert detector.threshold == 0.7
    with pytest.raises(UsageError, match="write NAME=VALUE"):
        named_detector("nsfwjs", ["threshold"])
    with pytest.raises(ErasureError):
        named_detector("nsfwjs", ["no-such=1"])


def test_answers_what_was_accepted_when_it_is_told_to_stop(model: str, cat: str, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    words = ["serve", "--model", model, "--erasure", cat, "--port", "0", "--audit", str(log), "--batch-size", "1"]
    program = subprocess.Popen(
        [sys.executable, "-m", "erasure", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        line = program.stdout.readline()
        assert line.startswith(f"Serving {model} without cat-uce on http://127.0.0.1:"), line
        address = line.split()[-1]
        answers: list[int] = []

        def ask() -> None:
            body = json.dumps({"prompt": "a photo of a dog", "steps": 20, "height": 32, "width": 32}).encode()
            request = urllib.request.Request(f"{address}/generate", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=900) as answer:
                answers.append(answer.status)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while True:
            with urllib.request.urlopen(f"{address}/health", timeout=60) as health:
                if json.load(health)["accepted"] == 3:
                    break
        program.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        out, err = program.communicate(timeout=900)
    finally:
        program.kill()
    assert answers == [200, 200, 200], err
    assert "Stopped: 3 pictures drawn, 0 refused, 0 failed" in out
    assert verify_log(log).events["drawn"] == 3
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/health", timeout=5)
