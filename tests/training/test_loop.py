"""The loop on a small network: resuming, sharing, stopping, and what a run's folder may hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erasure.errors import DivergenceError, MissingExtraError, OptionError, TrainingError
from erasure.training import checkpoint as checkpoint_module
from erasure.training.checkpoint import Checkpoint
from erasure.training.loop import Optimisation, Share, Trainer, make_accelerator
from erasure.training.run import CHECKPOINT, LOCK, RECIPE, Run
from erasure.training.states import stable_seed
from erasure.training.student import SubsetStudent
from erasure.training.turns import After, Turn

RECIPE_OF_IT: dict[str, Any] = {"strategy": "none", "options": {"lr": 0.1, "steps": 12}}


class Small:
    """A linear network that learns another one, with everything that the loop asks of a strategy."""

    def __init__(
        self, run: Run | None = None, *, kill_at: int | None = None, after: tuple[After, ...] = (), **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 3)).requires_grad_(False)
        self.goal = torch.randn(3, 6)
        self.kill_at, self.seen, self.losses_seen = kill_at, [], []
        self.student = SubsetStudent(self.network, ["0.weight", "0.bias"])
        self.validated: list[int] = []
        self.wanted = self.errors
        chosen = Optimisation(**{"steps": 12, "lr": 0.05, **options})
        turn = Turn(
            name="student", player=self.student, losses=lambda x: self.wanted(x), descent=chosen.descent, after=after
        )
        self.trainer = Trainer(
            turns=[turn], prepare=self.prepare, steps=chosen.steps, seed=0, accumulation=chosen.accumulation,
            run=run or Run(), accelerator=Accelerator(cpu=True), validate=self.validated.append,
        )  # fmt: skip
        self.learner = self.trainer.learners[0]

    def prepare(self, step: int, share: Share) -> Tensor:
        if step == self.kill_at:
            raise KeyboardInterrupt
        self.seen.append((step, share))
        generator = torch.Generator().manual_seed(stable_seed(0, step))
        return share.of(torch.randn(8, 6, generator=generator)) + 0 * torch.randn(1)

    def errors(self, x: Tensor) -> dict[str, Tensor]:
        # The global generator takes part, as samplers and dropout would.
        noisy = x + 0.01 * torch.randn(x.shape[1])
        return {"fit": (self.network(noisy) - x @ self.goal.T).square().mean()}

    def train(self) -> list[Tensor]:
        self.row = self.trainer.train(lambda share: None)
        return [value.detach().clone() for value in self.student.values]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_learns() -> None:
    small = Small(steps=300, clip=0.0)
    weight, _ = small.train()
    torch.testing.assert_close(weight, small.goal, rtol=0, atol=0.05)
    assert small.row["fit"] < 0.01
    assert small.seen == [(step, Share(0, 1)) for step in range(300)]


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"warmup": 5, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("kill_at", [1, 5, 11])
def test_a_killed_training_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any], kill_at: int) -> None:
    whole = Small(**options).train()
    run = Run(checkpoints=str(tmp_path), save_every=2)
    with pytest.raises(KeyboardInterrupt):
        Small(run, kill_at=kill_at, **options).train()
    again = Small(run, **options)
    assert equal(again.train(), whole)
    assert [step for step, _ in again.seen] == list(range(kill_at // 2 * 2, 12))
    finished = Small(run, **options)
    assert equal(finished.train(), whole)
    assert finished.seen == []


def test_parts_of_a_batch_add_up(tmp_path: Path) -> None:
    """Four parts one after the other are one whole; two processes are two of these parts."""

    def without_noise(small: Small) -> Small:
        small.wanted = lambda x: {"fit": (small.network(x) - x @ small.goal.T).square().mean()}
        return small

    whole, parts = without_noise(Small()), without_noise(Small(accumulation=4))
    for a, b in zip(whole.train(), parts.train(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [share for step, share in parts.seen if step == 0] == [Share(i, 4) for i in range(4)]
    assert parts.row["fit"] == pytest.approx(whole.row["fit"], rel=1e-4)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    Optimisation(steps=1, lr=1, accumulation=2).check_batches({"batch": 8, "retain_batch": 0}, 4)
    with pytest.raises(OptionError, match=r"'batch' is 6 and does not divide among 2 processes x 2 .*multiple of 4"):
        Optimisation(steps=1, lr=1, accumulation=2).check_batches({"batch": 6}, 2)


def test_the_gradient_is_clipped_and_warmed_up() -> None:
    small = Small(clip=1e-3, warmup=4, steps=2)
    rates: list[float] = []
    step = small.learner.optimiser.step

    def note(*args: Any, **options: Any) -> Any:
        rates.append(small.learner.optimiser.param_groups[0]["lr"])
        norms.append(float(torch.cat([p.grad.flatten() for p in small.learner.parameters]).norm()))  # type: ignore[union-attr]
        return step(*args, **options)

    norms: list[float] = []
    small.learner.optimiser.step = note  # type: ignore[method-assign]
    small.train()
    assert rates == pytest.approx([0.0125, 0.025])
    assert all(norm <= 1e-3 * 1.001 for norm in norms)


def test_a_running_mean_becomes_the_result() -> None:
    small = Small(ema=0.9)
    last: list[Tensor] = []
    validate = small.learner.average.step

    def note(parameters: Any) -> None:
        last[:] = [value.detach().clone() for value in small.student.values]
        validate(parameters)

    small.learner.average.step = note
    mean = small.train()
    assert not equal(mean, last)


def test_validation_comes_every_so_many_updates(tmp_path: Path) -> None:
    small = Small(Run(checkpoints=tmp_path, validate_every=5))
    small.train()
    assert small.validated == [5, 10]


class Noted(After):
    """Notes when it is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def start(self) -> None:
        self.calls.append((-1, 0.0))

    def apply(self, update: int, lr: float) -> None:
        self.calls.append((update, lr))


def test_what_comes_behind_a_step_starts_once_and_is_told_the_rate(tmp_path: Path) -> None:
    run, noted = Run(checkpoints=tmp_path, save_every=1), Noted()
    with pytest.raises(KeyboardInterrupt):
        Small(run, kill_at=3, after=(noted,), warmup=2).train()
    assert noted.calls == [(-1, 0.0), (0, 0.025), (1, 0.05), (2, 0.05)]
    again = Noted()
    Small(run, after=(again,), warmup=2).train()
    assert [update for update, _ in again.calls] == list(range(3, 12))


# Stopping ------------------------------------------------------------------------------------------------------------


def spoiled(small: Small, at: int, factor: float) -> Small:
    errors = small.errors
    small.wanted = lambda x: {
        name: term * (factor if small.seen[-1][0] >= at else 1) for name, term in errors(x).items()
    }
    return small


@pytest.mark.parametrize(("factor", "message"), [
    (float("nan"), r"'fit' is nan at step 11 of 12: lower lr \(now 0.05\)"),
    (1e6, r"'fit' is .* at step 11 of 12, and all terms \d+ times their start"),
])  # fmt: skip
def test_a_loss_that_is_nan_or_explodes_stops_it(tmp_path: Path, factor: float, message: str) -> None:
    run = Run(checkpoints=tmp_path, save_every=5)
    with pytest.raises(DivergenceError, match=message) as caught:
        spoiled(Small(run), 11, factor).train()
    assert f"the last checkpoint in {tmp_path} is kept" in str(caught.value)
    again = Small(run)
    again.train()
    assert [step for step, _ in again.seen] == [10, 11]


def test_a_full_disk_says_so_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Small().train()
    run = Run(checkpoints=tmp_path, save_every=3)
    writes = Path.write_bytes

    def full(path: Path, content: Any) -> int:
        if path.suffix == ".partial" and (tmp_path / CHECKPOINT).exists():
            writes(path, bytes(content)[:10])
            raise OSError(28, "No space left on device")
        return writes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.Path, "write_bytes", full)
        with pytest.raises(TrainingError, match=r"step 6 .*No space left on device.*the one of step 3 is kept"):
            Small(run).train()
    assert not list(tmp_path.glob("*.partial"))
    again = Small(run)
    assert equal(again.train(), whole)
    assert again.seen[0][0] == 3


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"broken")
    with pytest.raises(TrainingError, match=r"training.ckpt cannot be read .* delete it to start anew"):
        Checkpoint(tmp_path / CHECKPOINT).resume()


# The run's folder ----------------------------------------------------------------------------------------------------


def open_run(folder: Path, recipe: dict[str, Any] = RECIPE_OF_IT) -> None:
    with Run(checkpoints=folder).opened(recipe):
        pass


def test_the_same_training_may_go_on_and_another_may_not(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    open_run(folder)
    open_run(folder)
    other = {**RECIPE_OF_IT, "options": {"lr": 0.2, "steps": 12}}
    with pytest.raises(TrainingError, match=r"options.lr: 0.1 in the first, 0.2 in the second"):
        open_run(folder, other)
    Run(checkpoints=folder).discard()
    assert not folder.exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(TrainingError, match="holds no training"):
        open_run(tmp_path)
    (tmp_path / RECIPE).write_text("{")
    with pytest.raises(TrainingError, match="is damaged"):
        open_run(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
    with pytest.raises(TrainingError, match="cannot write"):
        open_run(tmp_path / "thesis.txt" / "run")


def test_logs_stay_when_the_rest_is_discarded(tmp_path: Path) -> None:
    run = Run(checkpoints=tmp_path, save_every=6)
    with run.opened(RECIPE_OF_IT):
        Small(run).train()
    (tmp_path / "validation").mkdir()
    run.discard()
    assert [item.name for item in tmp_path.iterdir()] == ["validation"]


HOLD = """
import sys, time
from pathlib import Path
from erasure.training.run import Run
with Run(checkpoints=Path(sys.argv[1])).opened({"strategy": "none", "options": {"lr": 0.1, "steps": 12}}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_processes_may_not_train_in_one_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with pytest.raises(TrainingError, match="another process is training"):
                open_run(tmp_path)
        finally:
            process.kill()  # no lock outlives its process
    open_run(tmp_path)
    assert (tmp_path / LOCK).exists()


def test_an_error_of_the_training_is_not_one_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the training"), Run(checkpoints=tmp_path).opened(RECIPE_OF_IT):
        raise OSError("of the training")
    with Run(checkpoints=tmp_path).opened(RECIPE_OF_IT):
        pass


# Trackers ------------------------------------------------------------------------------------------------------------


def test_losses_and_cost_are_tracked(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(checkpoints=tmp_path, tracker="tensorboard")
    small = Small(run)
    small.trainer.accelerator = make_accelerator(run, torch.device("cpu"))
    small.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert {"fit", "denoiser_forwards"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("fit")] == list(range(12))


def test_a_missing_tracker_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install 'wandb'"):
        make_accelerator(Run(tracker="wandb"), torch.device("cpu"))
