"""`erasure erase` of a strategy that trains, and `erasure bench training`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main as benchmark
from erasure import Erasure
from erasure.cli.bench_training import RELEASED, compared
from erasure.cli.main import main
from erasure.strategies import available
from erasure.strategies.trained import TrainedStrategy
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


@pytest.mark.parametrize("program", [lambda argv: main(["bench", *argv]), benchmark], ids=["bench", "benchmarks"])
def test_bench_training(program: Any, tiny_pipe_folder: Path, capsys: Any) -> None:
    names = ["esd", "concept_ablation", "doco"] if program is benchmark else ["advunlearn"]
    command = [
        "training", "--model", str(tiny_pipe_folder), "--anchor", "dog", "--updates", "1", "--rollout-steps", "3",
        "--strategies", *names,
    ]  # fmt: skip
    assert program([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in found["strategies"]] == names
    for row in found["strategies"]:
        assert row["passes_per_state"]["online"] > row["passes_per_state"]["kept"] > 0
        assert row["fill_seconds"] > 0
        assert row["speedup"] > 0
        assert row["released"]["fewer_per_state"] > 0
    assert program(["training", "--model", "canvas-sd", "--updates", "0"]) == 2


def test_a_whole_run_counts_the_filling() -> None:
    mode = {"updates": 10, "states": 4, "passes": 12.0, "seconds": 1.0, "fill_passes": 40.0, "fill_seconds": 5.0}
    online = mode | {"passes": 200.0, "seconds": 20.0, "fill_passes": 0.0, "fill_seconds": 0.0}
    found = compared("esd", mode, online)
    assert found["passes_per_state"] == {"kept": 4.0, "online": 50.0}
    assert found["passes"] == {"kept": 160.0, "online": 2000.0}
    assert found["released"] == {"passes": 54_000, "passes_per_state": 54.0, "fewer_per_state": 13.5}
    assert found["passes_ratio"] == pytest.approx(2000 / 160)
    assert found["speedup"] == pytest.approx(200 / 15)
    assert "released" not in compared("another", mode, online)


def test_every_trained_strategy_is_measured() -> None:
    assert set(RELEASED) == {name for name, strategy in available().items() if issubclass(strategy, TrainedStrategy)}
    # DoCo: 1000 images of 25 steps with guidance; 1000 updates of 16 student and 8 teacher rows without a student's
    # step, and 1000 with two backward passes of all 16 rows.
    assert RELEASED["doco"][0] == 1000 * 25 * 2 + 1000 * (16 + 8) + 1000 * (16 + 8 + 2 * 2 * 16)
