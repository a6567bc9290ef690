"""The benchmark of trained strategies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.training import RELEASED, compared, modes_of
from erasure.assets.build.measured import Measured
from erasure.assets.build.tables import TABLES
from erasure.errors import OptionError
from erasure.strategies import available, get
from erasure.strategies.looped import LoopedStrategy

SMALL = {"generation": {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}}
"""The least that the tiny pipeline draws, as its `canvas.json` declares it."""
MEASURED = Path(__file__).resolve().parents[2] / "docs" / "measured"


@pytest.fixture(scope="module")
def small(tiny_pipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a folder, which declares that it draws pictures of `SMALL` size."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny_pipe_folder, folder)
    (folder / "canvas.json").write_text(json.dumps(SMALL))
    return folder


def test_bench_training(small: Path, capsys: Any) -> None:
    names = ["advunlearn", "esd", "concept_ablation", "doco"]
    command = [
        "training", "--model", str(small), "--anchor", "dog", "--updates", "1", "--rollout-steps", "3",
        "--strategies", *names,
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in found["strategies"]] == names
    for row in found["strategies"]:
        assert row["passes_per_state"]["online"] > row["passes_per_state"]["kept"] > 0
        assert row["fill_seconds"] > 0
        assert row["speedup"] > 0
        assert row["released"]["fewer_per_state"] > 0
    assert main(["training", "--model", "canvas-sd", "--updates", "0"]) == 2


def test_figures_of_trainings_go_into_the_file_of_docs(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = Measured.read(MEASURED / "training.json")
    known.model_copy(update={"rows": []}).write(tmp_path / "training.json")
    command = [
        "training", "--model", str(small), "--anchor", "dog", "--updates", "1", "--rollout-steps", "3",
        "--strategies", "esd", "sfd", "--into", str(tmp_path), "--json",
    ]  # fmt: skip
    assert main(command) == 0
    told = {row["strategy"]: row for row in json.loads(capsys.readouterr().out)["strategies"]}
    esd, sfd = Measured.read(tmp_path / "training.json").rows
    assert esd["per_state_kept"] == pytest.approx(told["esd"]["passes_per_state"]["kept"], abs=0.01)
    assert esd["fewer_than_released"] == pytest.approx(told["esd"]["released"]["fewer_per_state"], abs=0.01)
    assert "faster_than_online" in esd
    assert "faster_than_online" not in sfd
    (shown,) = (table for table in TABLES.values() if table.data == "training")
    assert "| `sfd` | 50 | " in shown.markdown(Measured.read(tmp_path / "training.json"))


def test_a_strategy_without_trajectories_is_measured_once(small: Path, capsys: Any) -> None:
    """Each image of SFD: the generator, the fake-score network twice and the teacher twice, all with gradients."""
    command = [
        "training", "--model", str(small), "--anchor", "dog", "--updates", "1", "--strategies", "sfd",
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["strategies"]
    assert row["passes_per_state"] == {"kept": 3 * (1 + 1 + 1 + 2)}
    assert row["released"]["passes_per_state"] == (1 + 2 * 3) + (1 + 2 + 2) * 3
    assert not {"passes_ratio", "speedup"} & set(row)
    assert main(command) == 0
    assert "passes per training state, online" in capsys.readouterr().out


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
    alone = compared("another", mode, None)
    assert alone["passes"] == {"kept": 160.0}
    assert not {"passes_ratio", "speedup"} & set(alone)


def test_a_training_that_fails_loses_no_figures_of_those_before(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured.read(MEASURED / "training.json").model_copy(update={"rows": []}).write(tmp_path / "training.json")
    mode = {"updates": 10, "states": 4, "passes": 12.0, "seconds": 1.0, "fill_passes": 40.0, "fill_seconds": 5.0}

    def measure(pipe: object, name: str, *_: object) -> dict[str, float]:
        if name == "doco":
            raise OptionError("not this one")
        return mode

    monkeypatch.setattr("benchmarks.training.measure", measure)
    asked = ["training", "--model", str(small), "--strategies", "sfd", "doco", "--into", str(tmp_path)]
    assert main(asked) != 0
    assert [row["strategy"] for row in Measured.read(tmp_path / "training.json").rows] == ["sfd"]


@pytest.mark.parametrize("name", RELEASED)
def test_every_strategy_takes_its_states_in_the_ways_that_are_measured(name: str) -> None:
    """A way that its options refuse would end the whole benchmark."""
    modes = modes_of(name)
    assert modes[0] == "kept"
    for mode in modes[1:]:
        get(name).configured(states=mode)
    assert ("online" in modes) == (name not in {"mace", "sfd"})


def test_every_trained_strategy_is_measured() -> None:
    assert set(RELEASED) == {name for name, strategy in available().items() if issubclass(strategy, LoopedStrategy)}
    # DoCo: 1000 images of 25 steps with guidance; 1000 updates of 16 student and 8 teacher rows without a student's
    # step, and 1000 with two backward passes of all 16 rows.
    assert RELEASED["doco"][0] == 1000 * 25 * 2 + 1000 * (16 + 8) + 1000 * (16 + 8 + 2 * 2 * 16)
