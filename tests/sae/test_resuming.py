"""A training of an autoencoder goes on only where the same training stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure.backbones import text_towers
from erasure.errors import TrainingError
from erasure.files import held
from erasure.sae import SAETrainer, TrainingOptions
from erasure.sae.stream import DatasetPrompts, TokenStream
from erasure.sae.training import CHECKPOINT, RECIPE

PROMPTS = ["a cat", "a photo of a dog", "van gogh painting", "a house"]
OPTIONS = TrainingOptions(d_sae=48, k=3, steps=6, save_every=2, warmup=1)


class Killed(Exception):
    pass


def stream(pipe: Any, prompts: Any = PROMPTS, layer: int = 0, **options: Any) -> TokenStream:
    return TokenStream(text_towers(pipe)[0], layer, prompts, batch_size=4, **options)


def kill(share: float) -> None:
    if share > 0.6:
        raise Killed


@pytest.fixture
def folder(tiny_pipe: Any, tmp_path: Path) -> Path:
    """Of a training that was killed after its checkpoint of step 2."""
    with pytest.raises(Killed):
        SAETrainer(stream(tiny_pipe), OPTIONS, folder=tmp_path).train(kill)
    assert (tmp_path / CHECKPOINT).is_file()
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [*PROMPTS, "a gun"]}, "activations.prompts"),
        ({"layer": 1}, "activations.layer"),
        ({"seed": 5}, "activations.seed"),
        ({"pad_share": 0.5}, "activations.pad_share"),
        ({"learning_rate": 1e-2}, "options.learning_rate"),
        ({"options_seed": 1}, "options.seed"),
        ({"steps": 8}, "options.steps"),
        ({"batch_topk": False}, "options.batch_topk"),
        ({"model": True}, "activations.model"),
    ],
)
def test_nothing_else_goes_on(folder: Path, tiny_pipe: Any, changes: dict[str, Any], message: str) -> None:
    before = (folder / CHECKPOINT).read_bytes()
    if changes.pop("model", False):
        with torch.no_grad():
            next(tiny_pipe.text_encoder.parameters()).add_(1)
    own = {name: changes.pop(name) for name in ("prompts", "layer", "seed", "pad_share") if name in changes}
    if "options_seed" in changes:
        changes["seed"] = changes.pop("options_seed")
    with pytest.raises(TrainingError, match=rf"holds a training of something else.*{message}"):
        SAETrainer(stream(tiny_pipe, **own), dataclasses.replace(OPTIONS, **changes), folder=folder).train()
    assert (folder / CHECKPOINT).read_bytes() == before


def test_the_same_goes_on_to_the_bit(folder: Path, tiny_pipe: Any) -> None:
    whole = SAETrainer(stream(tiny_pipe), OPTIONS).train()
    trainer = SAETrainer(stream(tiny_pipe), dataclasses.replace(OPTIONS, save_every=3), folder=folder)
    resumed = trainer.train()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    (folder / "cfg.json").write_text("{}")
    trainer.discard_checkpoint()
    assert [path.name for path in folder.iterdir()] == ["cfg.json"]


def test_a_checkpoint_of_nobody_knows_what_is_refused(folder: Path, tiny_pipe: Any) -> None:
    (folder / RECIPE).unlink()
    with pytest.raises(TrainingError, match=r"without its training.json.*delete it"):
        SAETrainer(stream(tiny_pipe), OPTIONS, folder=folder).train()
    (folder / RECIPE).write_text("[" * 5000)
    with pytest.raises(TrainingError, match="damaged"):
        SAETrainer(stream(tiny_pipe), OPTIONS, folder=folder).train()


def test_one_training_at_a_time(folder: Path, tiny_pipe: Any) -> None:
    trainer = SAETrainer(stream(tiny_pipe), OPTIONS, folder=folder)
    recipe = json.loads((folder / RECIPE).read_text())
    with (
        held(folder, recipe, file=RECIPE, what="training"),
        pytest.raises(TrainingError, match="another process is training"),
    ):
        trainer.train()


def test_datasets_are_told_apart(tiny_pipe: Any) -> None:
    datasets = pytest.importorskip("datasets")

    def rows(*words: str) -> Any:
        return DatasetPrompts(datasets.Dataset.from_list([{"text": word} for word in words]).to_iterable_dataset())

    first, second, again = (stream(tiny_pipe, rows(*words)).recipe() for words in (("a", "b"), ("a", "c"), ("a", "b")))
    assert first == again
    assert first != second


def test_the_time_of_all_sessions_is_told(tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("erasure.training.checkpoint.time", SimpleNamespace(monotonic=lambda: clock.now))

    def slow(share: float) -> None:
        clock.now += 100
        kill(share)

    def fast(share: float) -> None:
        clock.now += 1

    with pytest.raises(Killed):
        SAETrainer(stream(tiny_pipe), OPTIONS, folder=tmp_path).train(slow)
    sae = SAETrainer(stream(tiny_pipe), OPTIONS, folder=tmp_path).train(fast)
    # Two steps to the last checkpoint, and the four behind it.
    assert sae.config.metadata["seconds"] == 204
    assert SAETrainer(stream(tiny_pipe), OPTIONS).train().config.metadata["seconds"] > 0
