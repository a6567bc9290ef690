"""The scripts that made the embedded models: each has help, and training goes on where it was stopped."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from erasure.assets.build.loop import batches, cosine
from erasure.assets.build.tokenizer import words
from erasure.training.checkpoint import Checkpoint


@pytest.mark.parametrize("step", ["sprites", "vae", "clip", "judge", "denoiser", "export", "evaluate", "families"])
def test_every_step_has_help(step: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "erasure.assets.build", step, "--help"], capture_output=True, text=True, check=True
    )
    assert "usage" in done.stdout
    assert step == "evaluate" or "--work" in done.stdout


def test_batches_are_seeded() -> None:
    _, first, captions = next(batches(4, seed=1))
    _, again, same = next(batches(4, seed=1))
    _, other, _ = next(batches(4, seed=2))
    assert torch.equal(first, again)
    assert captions == same
    assert not torch.equal(first, other)
    assert first.shape == (4, 3, 64, 64)
    assert first.min() >= -1
    assert first.max() <= 1


def test_checkpoint_resumes_to_the_step(tmp_path) -> None:
    def trainer():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimiser, Checkpoint(tmp_path / "state.ckpt", model=model, optimiser=optimiser)

    def run(model, optimiser, steps) -> None:
        for step in steps:
            optimiser.zero_grad()
            (model(torch.full((1, 3), float(step))) ** 2).sum().backward()
            optimiser.step()

    model, optimiser, state = trainer()
    assert state.resume() == 0
    run(model, optimiser, range(3))
    state.save(3)
    run(model, optimiser, range(3, 6))
    resumed, optimiser, state = trainer()
    assert state.resume() == 3
    run(resumed, optimiser, range(3, 6))
    assert torch.equal(model.weight, resumed.weight)
    assert [file.name for file in tmp_path.iterdir()] == ["state.ckpt"]


def test_learning_rate_rises_then_falls() -> None:
    rates = [cosine(step, 1000, peak=1.0) for step in range(1000)]
    assert rates[0] < rates[50] < rates[99] <= 1.0
    assert rates[100] > rates[500] > rates[999] > 0


def test_words_cover_the_world() -> None:
    assert {"cat", "kitten", "noto", "striped", "animal", "background"} <= set(words())
