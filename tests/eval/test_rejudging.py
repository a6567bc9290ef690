"""Images belong to what draws them: other judges and CLIP models see the same ones, and nothing is drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch import nn

from erasure.attach import ErasureManager
from erasure.errors import EvaluationError
from erasure.eval import Results, attack, evaluate, run
from erasure.eval.metrics.clip_score import ClipModel
from erasure.eval.recipe import is_identified, judge_fingerprint
from erasure.eval.table import read_rows


class Other:
    """A judge that answers otherwise, and says what it is."""

    version = "other 1"

    def __call__(self, images: Any) -> list[Any]:
        return [SimpleNamespace(object="dog", style="noto", shape="dog") for _ in images]


@pytest.fixture
def measure(tmp_path: Path, judge: Any) -> Callable[..., Results]:
    def call(pipe: Any, out: str, **options: Any) -> Results:
        defaults: dict[str, Any] = {
            "size": "full",
            "judge": judge,
            "baseline_cache": tmp_path / "cache",
            "clip": "none",
        }
        return evaluate(pipe, out=tmp_path / out, progress=False, batch_size=12, **(defaults | options))

    return call


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "samples.jsonl")


def images_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("images/*/*.png"))}


def test_another_judge_or_clip_model_draws_nothing(
    erased_pipe: Any, measure: Any, drawn: list[int], clip_folder: Path, tmp_path: Path
) -> None:
    first = measure(erased_pipe, "first")
    assert sum(drawn) == 24
    drawn.clear()
    second = measure(erased_pipe, "second", judge=Other())
    third = measure(erased_pipe, "third", judge=Other(), clip=clip_folder)
    plain = measure(erased_pipe, "plain", judge=lambda images: Other()(images))
    assert drawn == []
    answers = {name: {row["judged"]["object"] for row in rows(tmp_path / name)} for name in ("first", "second")}
    assert answers["second"] == {"dog"} != answers["first"]
    assert third.get("UA") == second.get("UA") | {"recipe": third.get("UA")["recipe"]}
    assert third.get("clip_score")["value"] is not None
    assert plain.get("UA")["recipe"]["judge"].startswith("<lambda> (source ")
    for name in ("second", "third", "plain"):
        assert images_of(tmp_path / name) == images_of(tmp_path / "first")
    # Drift is of the images, and so does not depend on who looks at them.
    assert second.get("drift")["value"] == first.get("drift")["value"]
    assert (second.cost["images_generated"], second.cost["images_from_cache"]) == (0, 24)


def test_what_changes_images_is_drawn_anew(erased_pipe: Any, measure: Any, drawn: list[int]) -> None:
    measure(erased_pipe, "first")
    drawn.clear()
    ErasureManager(erased_pipe).set_erasures("cat-noise", 0.5)
    measure(erased_pipe, "weaker")
    assert sum(drawn) == 12
    # A LoRA of the user's changes both sides, though none of the model's own weights.
    erased_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), "mine")
    drawn.clear()
    found = measure(erased_pipe, "with a LoRA")
    assert sum(drawn) == 24
    assert found.model["besides"][0]["adapters"] == {"mine": 4.0}
    drawn.clear()
    erased_pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    measure(erased_pipe, "with FreeU")
    assert sum(drawn) == 24


def test_a_judge_that_does_not_say_what_it_is_is_asked_again(
    erased_pipe: Any, measure: Any, tmp_path: Path
) -> None:  # fmt: skip
    asked: list[int] = []
    answer = ["dog"]

    def undeclared(images: Any) -> list[Any]:
        asked.append(len(images))
        return [SimpleNamespace(object=answer[0], style="noto", shape=answer[0]) for _ in images]

    measure(erased_pipe, "first", judge=undeclared)
    answer[0] = "cat"  # as if its weights had been replaced
    measure(erased_pipe, "second", judge=undeclared)
    assert sum(asked) == 48
    assert {row["judged"]["object"] for row in rows(tmp_path / "second")} == {"cat"}
    undeclared.version = "2"  # type: ignore[attr-defined]
    measure(erased_pipe, "third", judge=undeclared)
    asked.clear()
    measure(erased_pipe, "fourth", judge=undeclared)
    assert not asked  # what it said is known


def test_judges_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert judge_fingerprint(one) != judge_fingerprint(two)
    assert judge_fingerprint(one) == judge_fingerprint(one)
    assert is_identified(one)
    assert not is_identified(lambda images: images)
    names = {judge_fingerprint(judge) for judge in (Other(), len, lambda images: images)}
    assert names >= {"other 1", "len"}


# Pairs of two sizes --------------------------------------------------------------------------------------------------


def test_a_pair_of_two_sizes_is_a_missing_value(
    erased_pipe: Any, measure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip_folder: Path
) -> None:
    generate = run.generate
    odd: list[str] = []

    def sized(pipe: Any, samples: Any, *args: Any, **more: Any) -> Any:
        for batch, images in generate(pipe, samples, *args):
            if pipe is erased_pipe and not odd:
                images[0] = images[0].resize((12, 16))
                odd.append(batch[0].sample_id)
            yield batch, images

    monkeypatch.setattr(run, "generate", sized)
    found = measure(erased_pipe, "out", clip=clip_folder)
    (row,) = (row for row in read_rows(tmp_path / "out" / "samples.jsonl") if row["failures"])
    assert (row["sample_id"], row["variant"]) == (odd[0], "after")
    assert row["failures"] == {"drift": "the image before has 16x16 pixels, the one after 12x16"}
    assert row["drift"]["pixel"] is None
    assert row["drift"]["feature"] > 0
    assert row["judged"] is not None
    kept = sum(each["role"] != "target" for each in read_rows(tmp_path / "out" / "samples.jsonl")) // 2
    drift = found.get("drift")
    if row["role"] == "target":
        assert (drift["n"], drift.get("missing")) == (kept, None)
    else:
        assert (drift["n"], drift["missing"]) == (kept - 1, 1)
    monkeypatch.setattr(
        run, "generate", lambda pipe, samples, *a, **more: _all_small(generate, erased_pipe, pipe, samples, a)
    )
    none = measure(erased_pipe, "none", images=False, report=False, baseline_cache=tmp_path / "other")
    assert none.get("drift")["value"] is None
    assert "the one after 12x16" in none.get("drift")["reason"]


def _all_small(generate: Any, erased: Any, pipe: Any, samples: Any, arguments: Any) -> Any:
    for batch, images in generate(pipe, samples, *arguments):
        yield batch, [image.resize((12, 16)) if pipe is erased else image for image in images]


# Safety checkers -----------------------------------------------------------------------------------------------------


class Checker(nn.Module):
    """Finds every image unsafe."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images: Any, clip_input: Any) -> Any:
        return images * 0, [True] * len(images)


def extractor(images: Any, return_tensors: str) -> Any:
    return SimpleNamespace(to=lambda device: SimpleNamespace(pixel_values=torch.zeros(len(images), 3, 4, 4)))


def with_checker(pipe: Any) -> Any:
    pipe.register_modules(safety_checker=Checker())
    pipe.feature_extractor = extractor
    return pipe


def test_a_safety_checker_is_left_out_for_measuring_and_only_there(
    erased_pipe: Any, measure: Any, tmp_path: Path, drawn: list[int]
) -> None:
    bare = measure(erased_pipe, "bare")
    pipe = with_checker(erased_pipe)
    drawn.clear()
    found = measure(pipe, "checked", baseline_cache=tmp_path / "another")
    assert sum(drawn) == 24
    assert images_of(tmp_path / "checked") == images_of(tmp_path / "bare")
    assert found.metrics == bare.metrics
    assert found.get("UA")["recipe"]["safety_checker"] == "off"
    assert json.loads((tmp_path / "checked" / "recipe.json").read_text())["sampler"]["safety_checker"] == "off"
    assert (found.model["safety_checker"], bare.model["safety_checker"]) == ("left out for measuring", "off")
    assert found.model["fingerprint"] == bare.model["fingerprint"]
    # The caller's pipeline keeps it.
    assert isinstance(pipe.safety_checker, Checker)
    assert pipe.config.safety_checker[1] == "Checker"
    shown = pipe("a cat", num_inference_steps=1, height=32, width=32).images[0]
    assert shown.getextrema() == ((0, 0),) * 3
    assert ErasureManager(pipe).verify() == 1


def test_attacks_leave_a_safety_checker_out_too(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "judge": judge,
        "progress": False,
        "samples": 1,
        "size": "smoke",
        "iterations": 1,
        "timesteps": 1,
    }
    found = attack(with_checker(erased_pipe), concept="cat", out=tmp_path / "attack", **options)
    assert found.model["safety_checker"] == "left out for measuring"
    with Image.open(next((tmp_path / "attack" / "images").rglob("*.png"))) as image:
        assert image.getextrema() != ((0, 0),) * 3
    assert isinstance(erased_pipe.safety_checker, Checker)


def test_a_pipeline_without_a_checker_is_measured_itself(world_pipe: Any, measure: Any) -> None:
    assert "left out" not in str(measure(world_pipe, "plain", concepts="cat").model)
    with pytest.raises(EvaluationError, match="the judge does not know the object 'dog'"):
        measure(world_pipe, "unknown", concepts="cat", judge=_knowing(["cat", "gun"]))
    assert ClipModel("canvas-clip").name == "canvas-clip"


def _knowing(names: list[str]) -> Any:
    judge = Other()
    judge.object_names = names  # type: ignore[attr-defined]
    return judge


def test_a_picture_that_is_drawn_again_is_judged_again(
    erased_pipe: Any, measure: Any, tmp_path: Path
) -> None:  # fmt: skip
    asked: list[int] = []

    class Counting(Other):
        version = "counting"

        def __call__(self, images: Any) -> list[Any]:
            asked.append(len(images))
            return super().__call__(images)

    measure(erased_pipe, "first", judge=Counting())
    asked.clear()
    measure(erased_pipe, "second", judge=Counting())
    assert not asked
    (picture,) = sorted((tmp_path / "cache" / "drawings").glob("*/*.png"))[:1]
    picture.unlink()
    found = measure(erased_pipe, "third", judge=Counting())
    assert (sum(asked), found.cost["images_generated"]) == (1, 1)
