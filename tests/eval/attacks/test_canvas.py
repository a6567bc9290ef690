"""The attack on the embedded model: it brings back what a weak erasure took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import erasure
from erasure import Concept, ErasureManager
from erasure.eval import attack, replay
from erasure.eval.attacks.prompts import read_prompts
from erasure.eval.detectors import CanvasJudge


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_weak_erasure_falls(canvas: Any, tmp_path: Path, tensors_of: Any, changed_tensors: Any) -> None:
    weak = {"preset": "released", "templates": True, "preserve_start": True}
    erasure.erase(canvas, Concept("castle", anchor="house"), "uce", progress=False, **weak)
    before = tensors_of(canvas)
    budget = {"samples": 1, "noises": 4, "learning_rate": 0.1}
    results = attack(canvas, "unlearndiffatk", "castle", out=tmp_path / "attack", progress=False, **budget)
    assert changed_tensors(before, canvas) == set()
    assert results.get("pre_ASR")["value"] == 0
    assert results.get("ASR")["value"] == 1
    (first, *_) = read_prompts(tmp_path / "attack")
    name = f"{first.sample.sample_id}.png"
    folders = ("before", "after", "reference")
    shown = [Image.open(tmp_path / "attack" / "images" / folder / name) for folder in folders]
    assert [answer.object == "castle" for answer in CanvasJudge()(shown)] == [False, True, True]
    # The prompts do what they did when they are tried again, and on the original model.
    again = replay(canvas, tmp_path / "attack", out=tmp_path / "again", progress=False)
    assert (again.get("transfer_pre_ASR")["value"], again.get("transfer_ASR")["value"]) == (0, 1)
    ErasureManager(canvas).unload()
    stock = replay(canvas, tmp_path / "attack", out=tmp_path / "stock", progress=False)
    assert stock.get("transfer_pre_ASR", "before")["value"] == 1
