"""The load test of the service, small: none lost, none unerased, and it would notice either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="extra serve is not installed")
pytest.importorskip("uvicorn", reason="extra serve is not installed")

from benchmarks import serving
from benchmarks.__main__ import main
from erasure.cli.terminal import Terminal
from erasure.errors import EvaluationError


def test_none_is_lost_and_none_unerased(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert main(["serving", "--requests", "24", "--steps", "6", "--batch-size", "8", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert (figures["requests"], figures["lost"], figures["unerased"]) == (24, 0, 0)
    shown, others = map(int, figures["others that show what was asked for"].split(" of "))
    assert others == 12
    assert shown >= 8
    # Opened and locked, and then a line for each batch.
    assert figures["log lines"] == 2 + figures["batches"]
    said = capsys.readouterr().out
    assert "p50 seconds: " in said
    assert "p95 seconds: " in said


def test_pictures_that_nobody_could_judge_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CONFIDENT", 1.1)  # as after too few steps: the judge is sure of nothing
    with pytest.raises(EvaluationError, match="give more --steps"):
        serving.measure(serving.Serving(steps=1))


def test_words_that_the_judge_does_not_know_are_refused() -> None:
    with pytest.raises(EvaluationError, match="the judge knows no 'robot'; it knows cat, dog"):
        serving.measure(serving.Serving(others=("robot",)))


def test_what_is_lost_or_unerased_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for figures in ({"lost": 1, "unerased": 0}, {"lost": 0, "unerased": 1}):
        monkeypatch.setattr(serving, "measure", lambda options, figures=figures: figures)
        assert serving.run([], Terminal()) == 1
        assert "lost, or show" in capsys.readouterr().err


def test_a_service_that_does_not_answer_has_lost_a_picture() -> None:
    lost: Any = serving.ask("http://127.0.0.1:9", 0, "cat", 1)
    assert lost.picture is None
