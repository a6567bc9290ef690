"""Attacks on the embedded model: one brings back what a weak erasure took, and each runs against a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import erasure
from erasure import Concept, ErasureManager
from erasure.eval import attack, replay
from erasure.eval.attacks import ATTACKS
from erasure.eval.attacks.prompts import read_prompts
from erasure.eval.detectors import CanvasJudge
from erasure.eval.schemas import AttackRow
from erasure.eval.table import read_rows
from erasure.world import World


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


@pytest.fixture(scope="module")
def erased() -> Any:
    """The embedded model without castles."""
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    erasure.erase(pipe, Concept("castle", anchor="house"), "uce", progress=False)
    return pipe


QUICK: dict[str, dict[str, Any]] = {
    "unlearndiffatk": {"timesteps": 1, "iterations": 1},
    "random_prefix": {"texts": 1},
    "typo": {"texts": 1},
    "synonym": {"texts": 1},
    "inpaint": {"holes": (0.9,)},
    "sampler": {"schedulers": 0, "guidance_factors": ()},
    "tina": {"iterations": 1},
    "concept_inversion": {"steps": 1, "pictures": 1},
    "p4d": {"steps": 1},
}
"""Options with which the size `smoke` takes a second."""


@pytest.mark.parametrize("name", sorted(ATTACKS.built_in))
def test_each_has_an_outcome_against_a_real_erasure(
    name: str, erased: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "num_inference_steps", 4)
    options = dict(QUICK.get(name, {}))
    if name in ("synonym", "translation"):
        (tmp_path / "list.txt").write_text("fortress\n")
        options["file"] = str(tmp_path / "list.txt")
    out = tmp_path / "out"
    results = attack(erased, name, "castle", size="smoke", samples=1, out=out, progress=False, **options)
    (row,) = read_rows(out / "attacks.jsonl", AttackRow)
    assert row["success"] is not None, row["failures"]
    assert row["before"]["shown"] is False
    assert row["texts"] >= 1
    assert {each["name"] for each in results.metrics} > {"pre_ASR", "control_seen"}
    if row["success"]:
        (found,) = read_prompts(out)
        assert found.attempt.is_text == (row["text"] is not None)
