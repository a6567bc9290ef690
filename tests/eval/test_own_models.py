"""Attacks, stress tests and audits of models that declare no world: a suite on prompts gives prompts and a judge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure import ErasureManager
from erasure.cli.main import main
from erasure.errors import EvaluationError
from erasure.eval import attack, audit, replay, stress_test
from erasure.eval.attacks import get
from erasure.eval.attacks.victim import Victim
from erasure.eval.audits.runner import source_of
from erasure.eval.detectors import NamedDetector, Reading
from erasure.eval.detectors.findings import Finding
from erasure.eval.detectors.judging import FLAGGED
from erasure.eval.generation import generate
from erasure.eval.inputs import Inputs
from erasure.eval.one_concept import spread
from erasure.eval.run import Models
from erasure.eval.samples import Sample
from erasure.eval.suites import SUITES, Target
from tests.eval.conftest import attach_noise

SMALL = {"steps": 2, "side": 32, "retain": ("dog",)}
SAMPLE = Sample(
    "cat-0", "a photo of cat", 5, "target", (FLAGGED,), None, (FLAGGED,), num_inference_steps=2, height=32, width=32
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(NamedDetector):
    """Flags pictures whose contrast is nearer to one value than to another."""

    title = "contrast"
    licence = "none"
    name = "contrast"
    flagged: float = 0.0
    clear: float = 1000.0

    def recipe(self) -> Any:
        return {
            "detector": "contrast", "licence": "none", "weights": {}, "known": False, "classes": ["cat"],
            "flags": ["cat"], "threshold": self.threshold, "channels": "rgb", "side": 1, "unit": "image",
            "preprocessing": "std", "settings": {"flagged": self.flagged, "clear": self.clear},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading | Exception]:
        return [Reading({"cat": contrast(image)}) for image in images]

    def judge(self, reading: Reading) -> Finding:
        value = reading.scores["cat"]
        near = abs(value - self.flagged) < abs(value - self.clear)
        return Finding(near, float(near), frozenset({"cat"} if near else ()), {"cat": float(near)})


def contrast(image: Image.Image) -> float:
    return float(np.asarray(image, float).std())


@pytest.fixture
def pipe(tiny_pipe: Any) -> Any:
    attach_noise(tiny_pipe)
    tiny_pipe.set_progress_bar_config(disable=True)
    return tiny_pipe


@pytest.fixture
def inputs(pipe: Any) -> dict[str, Any]:
    """A detector that sees the concept in what the original model draws of one prompt, and not in the erased one's."""
    suite = SUITES.get("prompts").prepared(Inputs(detectors=(Contrast(),), **SMALL), pipe, ["cat"])  # type: ignore[arg-type]
    samples = suite.plan(pipe, ["cat"], "full", 0).samples
    (sample,) = spread([each for each in samples if each.role == "target"], 1)
    drawn = [next(iter(generate(each, [sample])))[1][0] for each in (ErasureManager(pipe).stock(), pipe)]
    flagged, clear = map(contrast, drawn)
    assert flagged != clear
    return {**SMALL, "detectors": (Contrast(flagged=flagged, clear=clear),)}


def test_an_attack_asks_the_detector_of_a_suite_on_prompts(pipe: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    more: dict[str, Any] = {"suite": "prompts", "inputs": inputs, "progress": False}
    found = attack(pipe, "random_prefix", size="smoke", samples=1, out=tmp_path / "a", **more)
    before, control = found.get("pre_ASR"), found.get("control_seen", "before")
    assert (before["value"], before["n"], control["value"]) == (0.0, 1, 1.0)
    assert found.get("chance_ASR")["value"] in (0.0, 1.0)
    assert "contrast" in before["recipe"]["judge"]
    assert before["recipe"]["list"]["templates"]
    (row,) = map(json.loads, (tmp_path / "a" / "attacks.jsonl").read_text().splitlines())
    assert row["prompt"] == "a photo of cat"
    assert row["control"]["judged"]["object"] == FLAGGED
    # A detector that sees the concept everywhere, and one that sees it nowhere, not even in the original model's.
    everywhere = attack(
        pipe, "random_prefix", size="smoke", samples=1, out=tmp_path / "b",
        **more | {"inputs": {**SMALL, "detectors": (Contrast(),)}},
    )  # fmt: skip
    assert everywhere.get("pre_ASR")["value"] == 1.0
    nowhere = {**SMALL, "detectors": (Contrast(flagged=1000.0, clear=0.0),)}
    found = attack(pipe, "random_prefix", size="smoke", samples=1, out=tmp_path / "c", **more | {"inputs": nowhere})
    assert found.get("chance_ASR")["value"] is None
    tried = replay(pipe, [("a cat on a table", 3)], "cat", out=tmp_path / "d", attack="mine", **more)
    assert tried.get("transfer_ASR")["n"] == 1


def test_words_of_a_concept_that_is_only_flagged_are_its_own(pipe: Any, tmp_path: Path) -> None:
    assert Target("cat", "object", (FLAGGED,)).words == ("cat",)
    assert Target("pets", "object", ("cat", "dog")).words == ("cat", "dog")
    (tmp_path / "list.csv").write_text("word,rewrite\ncat,kitten\n")
    quick: dict[str, dict[str, Any]] = {
        "ring_a_bell": {"population": 8, "generations": 2, "pairs": 2}, "mma": {"restarts": 1, "steps": 1},
        "typo": {}, "synonym": {"file": str(tmp_path / "list.csv")},
        "concept_inversion": {"steps": 1, "pictures": 1},
    }  # fmt: skip
    stock = ErasureManager(pipe).stock()
    for name, options in quick.items():
        known = {field.name for field in dataclasses.fields(get(name))}
        method = get(name).configured("smoke", **{key: value for key, value in options.items() if key in known})
        texts = []
        for member in ("cat", FLAGGED):
            sample = dataclasses.replace(SAMPLE, objects=(member,), erased=(member,))

            def sees(images: Any, member: str = member) -> list[Any]:
                return [SimpleNamespace(object=member, style=None) for _ in images]

            victim = Victim(
                pipe, stock, Target("cat", "object", (member,)), sees, samples=[sample], seed=3,
                folder=tmp_path / f"{name}-{member}",
            )  # fmt: skip
            victim.folder.mkdir()  # type: ignore[union-attr]
            texts.append([attempt.text for attempt in method.attempts(victim, sample)])
        assert texts[0] == texts[1], name
        assert texts[0], name


def test_a_stress_test_does_too(pipe: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    more: dict[str, Any] = {"suite": "prompts", "inputs": inputs, "size": "smoke", "progress": False, "clip": "none"}
    found = stress_test(pipe, "quantise", samples=1, retained=1, formats=("int8",), out=tmp_path / "a", **more)
    assert found.get("control_seen", "before")["value"] == 1.0
    assert found.get("concept_shown", "after")["value"] == 0.0
    # What is only flagged has no novel thing beside it, which a detector would not know.
    found = stress_test(pipe, "relearn", samples=1, retained=0, steps=(1,), out=tmp_path / "b", **more)
    names = {row["variant"] for row in found.metrics if row["name"] == "concept_shown"}
    assert {"relearned_1", "stock_concept_1"} <= names
    assert not any("new" in name for name in names)


def test_an_audit_of_such_a_model_takes_its_prompts_from_the_suite(
    pipe: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"attacks": ("prompt_embeds",), "stress": ("strength",), "size": "smoke"}
    given |= {"suites": ("prompts",), "clip": "none", "progress": False}
    found = audit(pipe, out=tmp_path / "a", inputs=inputs, **given)
    assert [(outcome.part.name, outcome.state) for outcome in found.outcomes if not outcome.part.is_control] == [
        ("prompts", "done"), ("prompt_embeds", "done"), ("strength", "done"),
    ]  # fmt: skip
    assert found.outcomes[0].finding.shown is not None, "what the detector flags counts"
    for outcome in found.outcomes:
        assert outcome.results is not None
        assert all(row["recipe"]["suite"] == "prompts" for row in outcome.results.metrics)
        assert all("contrast" in row["recipe"]["judge"] for row in outcome.results.metrics)
    with pytest.raises(EvaluationError, match="inputs"):
        audit(pipe, out=tmp_path / "a", inputs=inputs | {"retain": "house"}, **given)
    assert source_of(Models.of(pipe), ("coco", "i2p")) == "i2p"
    with pytest.raises(EvaluationError, match="retain are given, and none of the suites takes them"):
        audit(pipe, out=tmp_path / "b", **given | {"suites": ("canvas",)}, inputs={"retain": "dog"})
    assert not (tmp_path / "b").exists()


def test_a_model_of_the_embedded_world_is_attacked_with_its_own_judge(world_pipe: Any) -> None:
    assert source_of(Models.of(world_pipe), ("prompts",)) == "canvas"
    with pytest.raises(EvaluationError, match="canvas has a judge of its own"):
        attack(world_pipe, "typo", "cat", size="smoke", inputs={"detectors": ("nsfwjs",)})
    with pytest.raises(EvaluationError, match="canvas takes no retain"):
        attack(world_pipe, "typo", "cat", size="smoke", inputs={"retain": "dog"})


def test_what_is_missing_is_said(pipe: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(EvaluationError, match=r"declares no world.*Name a suite on prompts"):
        attack(pipe, "typo", "cat", size="smoke")
    with pytest.raises(EvaluationError, match=r"asks a CLIP model.*clip"):
        attack(pipe, "typo", "cat", size="smoke", suite="prompts")
    with pytest.raises(EvaluationError, match="takes no argument 'detector'"):
        stress_test(pipe, "noise", size="smoke", suite="prompts", inputs={"detector": "nsfwjs"})
    words = ["attack", "typo", "--model", "canvas-sd", "--concept", "cat", "--out", str(tmp_path / "b")]
    assert main([*words, "--suite", "prompts", "--detector", "nsfw"]) == 2
    assert "nsfwjs" in capsys.readouterr().err
    assert main([*words, "--detector", "nsfwjs"]) == 2
    assert "suites on prompts" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
