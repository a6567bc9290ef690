"""What an erasure that is attached with `strict=True` refuses counts neither as a success nor as a failure."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from erasure import ErasureManager
from erasure.errors import BypassedErasureWarning, EvaluationError
from erasure.eval import attack, attacks, replay, stress_test
from erasure.eval.attacks import Attack
from erasure.eval.attacks.prompt_embeds import handed_over
from erasure.eval.attempts import Attempt
from erasure.eval.audits.parts import Part
from erasure.eval.audits.verdicts import finding_of
from erasure.eval.schemas import ReplayRow
from erasure.eval.table import read_rows


class Cats:
    """A judge that sees a cat in every image."""

    version = "cats"

    def __call__(self, images: Any) -> list[Any]:
        return [SimpleNamespace(object="cat", style="noto") for _ in images]


class SeesFirst(Cats):
    """A judge that sees a cat in the stock model's images, and a dog in those of the erased one's own prompts."""

    version = "first"

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self, images: Any) -> list[Any]:
        answers = super().__call__(images)
        for image, answer in zip(images, answers, strict=True):
            answer.object = "dog" if image.tobytes() in self.plain else "cat"
        return answers


def drawn_plainly(pipe: Any) -> set[bytes]:
    """The erased model's images of the suite's prompts."""
    from erasure.eval import suites
    from erasure.eval.generation import generate

    plan = suites.get("canvas").plan(pipe, ["cat"], "full", 0)
    samples = [sample for sample in plan.samples if sample.role == "target"]
    return {image.tobytes() for _, images in generate(pipe, samples, 1) for image in images}


@pytest.fixture
def judge(erased_pipe: Any) -> SeesFirst:
    """See `SeesFirst`."""
    return SeesFirst(drawn_plainly(erased_pipe))


@pytest.fixture
def strict_pipe(erased_pipe: Any, judge: SeesFirst) -> Any:
    """The pipeline of the little world with its erasure attached strictly."""
    manager = ErasureManager(erased_pipe)
    (erasure,) = manager.erasures.values()
    manager.unload()
    manager.add(erasure, "cat", strict=True, check_base=False)
    return erased_pipe


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in read_rows(folder / "attacks.jsonl", ReplayRow)]


def test_refused_attempts_are_no_outcome(strict_pipe: Any, judge: SeesFirst, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedErasureWarning)
        results = attack(
            strict_pipe, "img2img", "cat", size="smoke", samples=2, out=tmp_path / "out", judge=judge, progress=False
        )
    assert results.get("pre_ASR")["value"] == 0
    held = results.get("held_by_refusal")
    assert (held["value"], held["n"]) == (1.0, 2)
    asr = results.get("ASR")
    assert (asr["value"], asr.get("worst")) == (None, None)
    assert "a picture that is handed in" in asr["reason"]
    assert asr["prompts"] == {"without_attack": 0, "by_attack": 0, "withstood": 0, "missing": 0, "refused": 2}
    for row in rows_of(tmp_path / "out"):
        assert (row["success"], row["held"], row["refused"], row["images"]) == (None, True, 1, 1)
        assert not row["failures"]
        assert not (tmp_path / "out" / "images" / "after" / f"{row['sample_id']}.png").exists()
    assert (tmp_path / "out" / "adversarial.jsonl").read_text() == ""
    found = finding_of(Part("attack", "img2img", "cat"), results)
    assert found.word == "not measured"
    assert "refused to draw" in found.detail


def test_what_is_not_refused_is_measured_as_ever(erased_pipe: Any, judge: SeesFirst, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": "smoke", "judge": judge, "progress": False, "samples": 2}
    loose = attack(erased_pipe, "random_prefix", "cat", out=tmp_path / "loose", **options)
    manager = ErasureManager(erased_pipe)
    (erasure,) = manager.erasures.values()
    manager.unload()
    manager.add(erasure, "noise", strict=True, check_base=False)
    strict = attack(erased_pipe, "random_prefix", "cat", out=tmp_path / "strict", **options)
    assert strict.get("held_by_refusal")["value"] == 0
    first, second = loose.get("chance_ASR"), strict.get("chance_ASR")
    assert [first[key] for key in ("value", "low", "high", "n")] == [
        second[key] for key in ("value", "low", "high", "n")
    ]
    with pytest.raises(EvaluationError, match="strict"):
        attack(erased_pipe, "random_prefix", "cat", out=tmp_path / "loose", **options)


def test_findings_of_others_that_are_refused(erased_pipe: Any, judge: SeesFirst, tmp_path: Path) -> None:
    common: dict[str, Any] = {"judge": judge, "progress": False}
    attack(erased_pipe, "img2img", "cat", size="smoke", out=tmp_path / "first", **common)
    manager = ErasureManager(erased_pipe)
    (erasure,) = manager.erasures.values()
    manager.unload()
    manager.add(erasure, "cat", strict=True, check_base=False)
    again = replay(erased_pipe, tmp_path / "first", out=tmp_path / "again", **common)
    assert again.get("transfer_ASR")["value"] is None
    assert again.get("transfer_pre_ASR")["value"] == 0
    assert again.get("held_by_refusal")["value"] == 1


@dataclass(frozen=True, kw_only=True)
class Both(Attack):
    """Hands over embeddings first, which the guard of a text encoder refuses, and then a prompt."""

    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {"smoke": {"samples": 1}, "quick": {}, "full": {}}
    title: ClassVar[str] = "both"
    paper: ClassVar[str] = "none"

    @property
    def tries(self) -> int:
        """Two."""
        return 2

    def attempts(self, victim: Any, sample: Any) -> Iterator[Attempt]:
        """See the class. What is searched with is not looked at."""
        call = handed_over(victim.backbone, sample)
        strange = {name: given + 1 if isinstance(given, torch.Tensor) else given for name, given in call.items()}
        yield Attempt(strange)
        yield Attempt({"prompt": sample.prompt})


@pytest.fixture
def text_pipe(world_pipe: Any) -> Any:
    """The pipeline of the little world with an erasure in its text encoder, attached strictly."""
    from erasure.artifact import Erasure, ErasureConfig
    from erasure.carriers.edits import Edits
    from erasure.concept import Concept

    path = "encoder.layers.0.self_attn.out_proj.weight"
    weight = world_pipe.text_encoder.get_parameter(path)
    config = ErasureConfig("noise", [Concept("cat").to_dict()], "stable-diffusion", cost={"seconds": 1.5})
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    edits = Edits(deltas={f"text_encoder/{path}": delta})
    ErasureManager(world_pipe).add(Erasure(config, edits), "cat", strict=True, check_base=False)
    return world_pipe


def test_attempts_of_which_some_are_drawn_have_an_outcome(
    text_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "get", lambda name: Both)
    judge = SeesFirst(drawn_plainly(text_pipe))
    results = attack(text_pipe, "both", "cat", size="smoke", out=tmp_path / "out", judge=judge, progress=False)
    (row,) = rows_of(tmp_path / "out")
    assert (row["success"], row["held"], row["refused"], row["images"]) == (False, False, 1, 2)
    assert results.get("ASR")["value"] == 0
    assert results.get("held_by_refusal")["value"] == 0


def test_embeddings_of_the_stock_text_encoder_are_refused(text_pipe: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": "smoke", "judge": SeesFirst(drawn_plainly(text_pipe)), "progress": False}
    results = attack(text_pipe, "prompt_embeds", "cat", out=tmp_path / "out", **options)
    assert "prompt_embeds= bypasses cat" in results.get("ASR")["reason"]
    control = attack(text_pipe, "prompt_embeds", "cat", out=tmp_path / "control", control=True, **options)
    assert control.get("held_by_refusal")["value"] == 0


@pytest.mark.parametrize("name", ["noise", "restore"])
def test_stress_tests_change_a_strict_model_all_the_same(name: str, text_pipe: Any, tmp_path: Path) -> None:
    results = stress_test(
        text_pipe, name, "cat", size="smoke", out=tmp_path / "out", judge=Cats(), progress=False, report=False
    )
    assert results.get("concept_shown", "after")["n"] > 0
