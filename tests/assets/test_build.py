"""The scripts that made the embedded models: each has help, and training goes on where it was stopped."""

from __future__ import annotations

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from erasure import assets
from erasure.assets.build import denoiser
from erasure.assets.build.bank import Bank
from erasure.assets.build.loop import batches, cosine
from erasure.assets.build.tokenizer import words
from erasure.training.checkpoint import Checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("step", ["sprites", "vae", "clip", "judge", "denoiser", "export", "evaluate", "families"])
def test_every_step_has_help(step: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["build", step, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("erasure.assets.build", run_name="__main__")
    said = capsys.readouterr().out
    assert "usage" in said
    assert step == "evaluate" or "--work" in said


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


def test_a_denoiser_goes_on_from_the_shipped_one_and_resumes(tmp_path) -> None:
    denoiser.train(tmp_path, 2, batch=4, bank=50, shipped=True)
    denoiser.train(tmp_path, 3, batch=4, bank=50, shipped=True)
    rows = [json.loads(row) for row in (tmp_path / "unet.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert all(0 < row[of] < 1 for row in rows for of in ("loss", "grounding"))
    weights = [load_file(folder / "unet" / WEIGHTS) for folder in (tmp_path, assets.path("canvas-sd"))]
    change = max(float((weights[0][name] - tensor).abs().max()) for name, tensor in weights[1].items())
    assert 0 < change < 0.01
    text = (tmp_path / "unet.options.json").read_text()
    assert json.loads(text)[0] == {
        "from_step": 0, "processes": 1, "device": "cpu", "batch": 4, "peak": 1e-3, "pairs": 0.4, "emptied": 0.4,
        "grounding": 0.3, "grounded": 0.8,
    }  # fmt: skip


def test_a_bank_draws_pairs_by_their_share_and_empty_captions_by_theirs(tmp_path) -> None:
    vae = AutoencoderKL.from_pretrained(assets.path("canvas-sd") / "vae")
    bank = Bank.of(vae, tmp_path / "latents.pt", 50, seed=1, pairs=0.8)
    rows, captions = bank.draw(np.random.default_rng(0), 2000, dropped=0.2)
    assert np.mean([len(bank.scenes[row].objects) == 2 for row in rows]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([text == "" for text in captions]) == pytest.approx(0.2, abs=0.03)
    again = Bank.of(vae, tmp_path / "latents.pt", 50, seed=1, pairs=0.8)
    assert torch.equal(bank.latents, again.latents)
    larger = Bank.of(vae, tmp_path / "latents.pt", 100, seed=1, pairs=0.8)
    assert len(larger.latents) == len(larger.scenes) == 100
    torch.testing.assert_close(larger.latents[:50], bank.latents)
