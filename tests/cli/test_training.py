"""`erasure erase` of a strategy that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erasure import Erasure
from erasure.cli.main import main
from erasure.training.run import Run

QUICK = ["--steps", "2", "--batch", "2", "--retain-batch", "2", "--rollout-steps", "2", "--contexts", "0"]


def erase(model: Path, out: Path, *more: str) -> int:
    return main(["erase", "esd", "--model", str(model), "--concept", "cat", "--out", str(out), *QUICK, *more])


def test_a_training_leaves_its_result_and_its_logs(tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "cat"
    assert erase(tiny_pipe_folder, out, "--tracker", "tensorboard", "--validate-every", "1") == 0
    assert Erasure.load(out).config.strategy_config["steps"] == 2
    kept = tmp_path / "cat.training"
    assert sorted(item.name for item in kept.iterdir()) == ["erasure", "validation"]
    assert "MB in" in capsys.readouterr().out


def test_a_training_of_something_else_is_one_line(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: its checkpoints are there, and the options are others now."""
    runs = tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "discard", lambda run: None)
        assert erase(tiny_pipe_folder, tmp_path / "one", "--checkpoints", str(runs)) == 0
    assert erase(tiny_pipe_folder, tmp_path / "two", "--checkpoints", str(runs), "--lr", "1") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("erasure: error: ")
    assert "options.lr: " in error
    assert "in the first, 1.0 in the second" in error
    assert not (tmp_path / "two").exists()


def test_strategies_that_do_not_train_have_no_such_options(tmp_path: Path, capsys: Any) -> None:
    assert main(["erase", "uce", "--model", "m", "--concept", "cat", "--checkpoints", str(tmp_path)]) == 2
    assert "--checkpoints" in capsys.readouterr().err
