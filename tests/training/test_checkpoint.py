"""Checkpoints that are damaged or of something else are refused before anything of them is loaded."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import files
from erasure.errors import TrainingError
from erasure.training.checkpoint import Checkpoint

Made = tuple[torch.nn.Linear, torch.optim.Optimizer, Checkpoint]


def make(folder: Path, width: int = 3) -> Made:
    torch.manual_seed(width)
    model = torch.nn.Linear(width, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimiser, Checkpoint(folder / "training.ckpt", model=model, optimiser=optimiser)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, optimiser, checkpoint = make(tmp_path)
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    checkpoint.save(3)
    return tmp_path


def put(*place: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in place[:-1]:
            state = state[key]
        state[place[-1]] = value

    return change


def drop(*place: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in place[:-1]:
            state = state[key]
        del state[place[-1]]

    return change


def nested() -> list[Any]:
    """Small on disk, without an end in memory: each level holds the one below twenty times."""
    value: list[Any] = [1.0]
    for _ in range(15):
        value = [value] * 20
    return value


MOMENT = ("optimiser", "state", 0)


@pytest.mark.parametrize(
    "change",
    [
        put("step", value=-5), put("step", value=10**30), put("step", value=2.0), put("step", value=True),
        put("step", value=None), put("step", value=torch.tensor(3)), put("step", value=11), drop("step"),
        put("seconds", value=float("nan")), put("seconds", value=-1.0), put("seconds", value="1"), drop("seconds"),
        put("more", value=1), drop("model"), put("model", value=None), put("model", value={}), put("model", value=[1]),
        put("model", "weight", value=torch.ones(2, 4)), put("model", "weight", value=torch.ones(2, 3).half()),
        put("model", "weight", value=torch.full((2, 3), torch.nan)), put("model", "weight", value=None),
        put("model", "weight", value=torch.ones(2, 3).to_sparse()), put("model", "other", value=torch.ones(2, 3)),
        put("model", "weight", value=torch.zeros(1).expand(10**12)), put("model", "weight", value="x"),
        drop("model", "weight"), put("optimiser", value={}), put("optimiser", "state", value=[]),
        put("optimiser", "state", value={7: {}}), put("optimiser", "state", value={"0": {}}),
        put("optimiser", "state", value={-1: {}}), put(*MOMENT, value={}), put(*MOMENT, value=None),
        put(*MOMENT, "exp_avg", value=torch.ones(5)), put(*MOMENT, "exp_avg", value=torch.tensor(torch.inf)),
        put(*MOMENT, "exp_avg_sq", value=torch.ones(2, 3, dtype=torch.complex64)), put(*MOMENT, "step", value="x"),
        put(*MOMENT, "step", value=nested()), put("optimiser", "param_groups", value=[]),
        put("optimiser", "param_groups", 0, "betas", value=(2.0, 2.0)),
        put("optimiser", "param_groups", 0, "lr", value="x"), put("optimiser", "param_groups", 0, "params", value=[0]),
        put("optimiser", "param_groups", 0, "amsgrad", value=True),
    ],
)  # fmt: skip
def test_what_is_not_of_this_training_is_refused_and_nothing_loaded(folder: Path, change: Any) -> None:
    path = folder / "training.ckpt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    model, optimiser, checkpoint = make(folder)
    before = model.weight.clone()
    with pytest.raises(TrainingError, match="delete it to start anew") as caught:
        checkpoint.resume(10)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(model.weight, before)
    assert not optimiser.state
    assert checkpoint.step == 0


def test_the_same_training_goes_on(folder: Path) -> None:
    assert make(folder)[2].resume(3) == 3
    with pytest.raises(TrainingError, match=r"model\.weight is"):
        make(folder, 4)[2].resume()


class Intruder:
    def __reduce__(self) -> Any:
        return (print, ("never to be run",))


def test_nothing_in_it_is_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "training.ckpt"
    torch.save({"step": 1, "seconds": 1.0, "model": Intruder(), "optimiser": {}}, path)
    with pytest.raises(TrainingError, match="could run code"):
        make(folder)[2].resume()
    torch.save({"step": 1}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(TrainingError, match="cannot be read"):
        make(folder)[2].resume()
    assert "never" not in capsys.readouterr().out


def test_what_grows_when_unpacked_is_refused(folder: Path) -> None:
    path = folder / "training.ckpt"
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(TrainingError, match="compressed"):
        make(folder)[2].resume()


@pytest.mark.parametrize("become", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_no_file_is_refused_at_once(folder: Path, become: Any) -> None:
    (folder / "training.ckpt").unlink()
    become(folder / "training.ckpt")
    with pytest.raises(TrainingError, match="cannot be read"):
        make(folder)[2].resume()


@pytest.mark.parametrize("number", [28, 30])
def test_a_disk_that_takes_nothing_keeps_the_last(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    checkpoint = make(folder)[2]
    assert checkpoint.resume() == 3
    with pytest.raises(TrainingError, match=f"{os.strerror(number)}.*the one of step 3 is kept"):
        checkpoint.save(4)
    assert [path.name for path in folder.iterdir()] == ["training.ckpt"]
    assert make(folder)[2].resume() == 3


# Folders of work -----------------------------------------------------------------------------------------------------


def test_a_recipe_that_hurts_is_a_named_error(tmp_path: Path) -> None:
    for content in ("[" * 5000, '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', "[]", '"x"', "\xff"):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(TrainingError, match=r"damaged.*start anew"), files.held(
            tmp_path, {}, file="recipe.json", what="work"
        ):  # fmt: skip
            pass
    (tmp_path / "recipe.json").write_text('{"a": "' + "\x1b" * 0 + "x" * 10**6 + '"}')
    with pytest.raises(TrainingError) as caught, files.held(tmp_path, {"b": 1}, file="recipe.json", what="work"):
        pass
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("become", [os.mkdir, lambda path: os.symlink("precious", path)])
def test_a_lock_that_is_none_is_a_named_error(tmp_path: Path, become: Any) -> None:
    (tmp_path / "precious").write_text("mine")
    become(tmp_path / "lock")
    with (
        pytest.raises(TrainingError, match=r"lock|directory"),
        files.held(tmp_path, {}, file="a", what="work", beside=None),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
