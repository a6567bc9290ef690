"""Successes that are no text: written down, tried again, resumed, shared by processes; refusals; damaged files."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erasure import ErasureManager
from erasure.errors import EvaluationError, UnsupportedModelError
from erasure.eval import Results, attack, replay, suites
from erasure.eval.attacks.changes import AnotherSampler, AnotherTask, Resumed, Words
from erasure.eval.attacks.concept_inversion import ConceptInversion
from erasure.eval.attacks.prompts import listed_prompts, read_prompts
from erasure.eval.attacks.stored import UnstorableError, restore, store
from erasure.eval.attempts import Attempt
from erasure.eval.generation import generate
from erasure.eval.report import chips
from erasure.eval.schemas import ReplayRow
from erasure.eval.table import read_rows
from tests.eval.conftest import attach_noise, declare_world, killed_judge

QUICK: dict[str, dict[str, Any]] = {
    "img2img": {}, "inpaint": {}, "completion": {}, "sampler": {"schedulers": 1}, "tina": {"steps": 2},
    "concept_inversion": {"steps": 1, "pictures": 2},
}  # fmt: skip
"""Attacks whose successes are no text, made quick."""


@pytest.fixture
def odd_judge(erased_pipe: Any) -> Any:
    """A judge that sees a dog in what the erased model draws of the prompts as they are, and a cat in all else."""
    plan = suites.get("canvas").plan(erased_pipe, ["cat"], "full", 0)
    samples = [sample for sample in plan.samples if sample.role == "target"]
    plain = [np.asarray(image, float) for _, images in generate(erased_pipe, samples, 1) for image in images]

    def judge(images: Any) -> list[Any]:
        given = [np.asarray(image, float) for image in images]
        known = [any(a.shape == b.shape and np.abs(a - b).max() <= 2 for b in plain) for a in given]
        return [SimpleNamespace(object=("cat", "dog")[same], style="noto") for same in known]

    judge.version = "odd"  # type: ignore[attr-defined]
    return judge


@pytest.fixture
def run(tmp_path: Path, odd_judge: Any) -> Callable[..., Results]:
    def call(pipe: Any, name: str, out: str = "out", **options: Any) -> Results:
        given = {"size": "smoke", "judge": odd_judge, "progress": False, **QUICK.get(name, {}), **options}
        return attack(pipe, name, "cat", out=tmp_path / out, **given)

    return call


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "attacks.jsonl", ReplayRow)
    return [{key: value for key, value in row.items() if key not in ("seconds", "recalled")} for row in rows]


@pytest.mark.parametrize("name", QUICK)
def test_a_success_is_tried_again_on_another_erasure(
    name: str, erased_pipe: Any, run: Any, odd_judge: Any, tmp_path: Path, tensors_of: Any, changed_tensors: Any
) -> None:
    before = tensors_of(erased_pipe)
    results = run(erased_pipe, name)
    assert (results.get("pre_ASR")["value"], results.get("ASR")["value"]) == (0, 1)
    (row,) = rows_of(tmp_path / "out")
    assert (row["text"], row["success"]) == (None, True)
    (found,) = read_prompts(tmp_path / "out")
    assert found.stored == row["attempt"]
    assert not found.attempt.is_text
    again = replay(erased_pipe, tmp_path / "out", out=tmp_path / "again", judge=odd_judge, progress=False)
    assert (again.get("transfer_pre_ASR")["value"], again.get("transfer_ASR")["value"]) == (0, 1)
    pictures = [
        np.asarray(Image.open(tmp_path / folder / "images" / "after" / f"{row['sample_id']}.png"), float)
        for folder in ("out", "again")
    ]
    assert np.array_equal(*pictures)
    # On another model that nothing was done to, it draws something else and is judged there.
    ErasureManager(erased_pipe).unload()
    stock = replay(erased_pipe, tmp_path / "out", out=tmp_path / "stock", judge=odd_judge, progress=False)
    assert stock.get("transfer_ASR", "before")["n"] == 1
    attach_noise(erased_pipe)
    assert changed_tensors(before, erased_pipe) == set()


def test_a_killed_attack_goes_on_with_what_was_made_once(
    erased_pipe: Any, run: Any, odd_judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, real = [], ConceptInversion.learned
    monkeypatch.setattr(ConceptInversion, "learned", lambda self, *args: learned.append(1) or real(self, *args))
    first = run(erased_pipe, "concept_inversion", samples=3, batch_size=1)
    interrupted = killed_judge(odd_judge, 9)
    with pytest.raises(KeyboardInterrupt):
        run(erased_pipe, "concept_inversion", "killed", samples=3, batch_size=1, judge=interrupted)
    assert 0 < len(rows_of(tmp_path / "killed")) < 3
    again = run(erased_pipe, "concept_inversion", "killed", samples=3, batch_size=1)
    assert len(learned) == 2
    assert again.metrics == first.metrics
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "out")
    for file in sorted((tmp_path / "out" / "adversarial").iterdir()):
        assert (tmp_path / "killed" / "adversarial" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["img2img", "concept_inversion"])
def test_processes_give_one_process_numbers(
    name: str, erased_pipe: Any, run: Any, tmp_path: Path, second_of_two: Any
) -> None:
    single = run(erased_pipe, name, samples=2, batch_size=1)
    processes = second_of_two(single, tmp_path)
    run(erased_pipe, name, "two", samples=2, batch_size=1)
    processes.rank = 0
    run(erased_pipe, name, "two", samples=2, batch_size=1)
    both = run(erased_pipe, name, "two", samples=2, batch_size=1)
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "out")
    assert both.metrics == single.metrics
    assert (tmp_path / "two" / "adversarial.jsonl").read_bytes() == (
        tmp_path / "out" / "adversarial.jsonl"
    ).read_bytes()


def test_what_cannot_be_attacked_is_refused_with_the_reason(tiny_models: Any, tmp_path: Path) -> None:
    pipe = declare_world(tiny_models["flux"](), tmp_path / "model")
    for name, said in (("image_prompt", "joint attention"), ("translation", "list of translations")):
        with pytest.raises(UnsupportedModelError, match=f"attack {name} cannot be tried on a FluxPipeline: .*{said}"):
            attack(pipe, name, "cat", size="smoke", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_reports_say_what_the_attacker_needs(tmp_path: Path) -> None:
    common = {"size": "quick", "model": {"name": "m"}, "erasures": [], "metrics": [], "cost": {}}
    assert chips(Results(suite="img2img", **common)) == [
        "attack img2img / quick",
        "model m",
        "the attacker needs: image",
    ]
    assert chips(Results(suite="canvas", **common)) == ["suite canvas / quick", "model m"]


# Prompts of others ---------------------------------------------------------------------------------------------------


def test_prompts_of_others_stand_for_themselves(erased_pipe: Any, odd_judge: Any, tmp_path: Path) -> None:
    given = [("zq kx", 1), ("a kitten", None), ("a kitten", 7)]
    results = replay(
        erased_pipe, given, "cat", attack="ring_a_bell", out=tmp_path / "out", judge=odd_judge, progress=False
    )
    assert {row["name"] for row in results.metrics} == {"transfer_ASR", "control_seen"}
    assert results.get("transfer_ASR")["n"] == 3
    rows = rows_of(tmp_path / "out")
    assert [(row["prompt"], row["text"], row["images"]) for row in rows] == [(text, text, 1) for text, _ in given]
    assert [row["seed"] for row in rows][::2] == [1, 7]
    assert all(row["before"] == row["after"] for row in rows)
    assert results.suite == "ring_a_bell"


def test_a_list_that_cannot_be_used_is_refused(erased_pipe: Any, tmp_path: Path) -> None:
    for given, said in (([], "a list of 0 prompts"), ([("a", 1), ("b", 1), ("a", 1)], "'a' with one seed twice")):
        with pytest.raises(EvaluationError, match=said):
            replay(erased_pipe, given, "cat", out=tmp_path / "out", progress=False)
    assert listed_prompts([("a", None)], read_sample(erased_pipe), TARGET, {"attack": "x"})[0].text == "a"


def read_sample(pipe: Any) -> Any:
    return suites.get("canvas").plan(pipe, ["cat"], "smoke", 0).samples[0]


TARGET = suites.Target("cat", "object", ("cat",))


# Files ---------------------------------------------------------------------------------------------------------------


def everything() -> Attempt:
    """An attempt with something of every kind."""
    call = {
        "prompt": "a", "prompt_2": None, "latents": torch.ones(1, 2), "prompt_embeds": torch.ones(1, 3).half(),
        "image": Image.new("RGB", (8, 8), "red"), "strength": 0.5, "num_inference_steps": 3,
        "negative_prompt": ["b"], "callback_on_step_end": Resumed(2, torch.zeros(2)),
    }  # fmt: skip
    return Attempt(call, Words({"text_encoder": [3]}, {"text_encoder": torch.ones(1, 4)}), box=(0, 1, 2, 3))


def test_everything_that_is_written_is_read_again(tmp_path: Path) -> None:
    record = json.loads(json.dumps(store(everything(), tmp_path, "one")))
    again = restore(record, tmp_path)
    wanted = everything()
    assert set(again.call) == set(wanted.call)
    assert again.box == wanted.box
    for name in ("latents", "prompt_embeds"):
        assert again.call[name].dtype == wanted.call[name].dtype
        assert torch.equal(again.call[name], wanted.call[name])
    assert np.array_equal(np.asarray(again.call["image"]), np.asarray(wanted.call["image"]))
    assert torch.equal(again.call["callback_on_step_end"].latents, torch.zeros(2))
    assert again.change.ids == {"text_encoder": [3]}
    assert torch.equal(again.change.vectors["text_encoder"], torch.ones(1, 4))
    assert {name: again.call[name] for name in ("prompt", "prompt_2", "strength", "negative_prompt")} == {
        "prompt": "a", "prompt_2": None, "strength": 0.5, "negative_prompt": ["b"],
    }  # fmt: skip


def test_what_is_no_data_is_not_written_down(tmp_path: Path) -> None:
    for attempt in (Attempt(change=lambda pipe: pipe), Attempt({"generator": 1}), Attempt({"latents": object()}),
                    Attempt({"strength": float("nan")})):  # fmt: skip
        with pytest.raises(UnstorableError, match="an attempt with"):
            store(attempt, tmp_path, "one")
    assert not list(tmp_path.iterdir())


def changed(record: dict[str, Any], **fields: Any) -> dict[str, Any]:
    made = copy.deepcopy(record)
    for name, value in fields.items():
        made[name] = {**made[name], **value} if isinstance(value, dict) and isinstance(made[name], dict) else value
    return made


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"call": {"generator": 3}}, "gives the argument 'generator'; allowed: "),
        ({"call": {"strength": "much"}}, "gives strength as 'much'; expected: float or int"),
        ({"call": {"strength": True}}, "gives strength as True"),
        ({"call": {"image": {"tensor": "tensor_0"}}}, "gives image as"),
        ({"call": {"image": {"picture": 7}}}, "names the picture 7"),
        ({"call": {"latents": {"tensor": "tensor_9"}}}, "expected a tensor, a picture, a table, or one of"),
        ({"change": {"kind": "os.system", "fields": {}}}, "expected a tensor, a picture, a table, or one of"),
        ({"change": {"kind": "task", "fields": {"task": "Upscale"}}}, "task is 'Upscale'; there are: Img2Img"),
        ({"change": {"kind": "sampler", "fields": {"scheduler": 3, "options": {"table": {}}}}}, "scheduler is 3"),
        ({"change": {"kind": "sampler", "fields": {"scheduler": "X"}}}, "expected ['options', 'scheduler']"),
        ({"change": {"kind": "resumed", "fields": {"step": 1, "latents": {"tensor": "tensor_0"}}}}, "a change that"),
        ({"change": {"kind": "words", "fields": {"ids": {"table": {"a": [-1]}}, "vectors": {"table": {}}}}}, "words"),
        ({"stem": "../one"}, "one"),
        ({"files": {"../../one.safetensors": "0" * 64}}, "one.safetensors"),
    ],
)  # fmt: skip
def test_records_that_say_something_else_are_refused(fields: Any, said: str, tmp_path: Path) -> None:
    record = changed(store(everything(), tmp_path, "one"), **fields)
    with pytest.raises(EvaluationError) as caught:
        restore(record, tmp_path)
    assert said in str(caught.value)


def test_files_that_are_others_are_refused(tmp_path: Path) -> None:
    record = store(everything(), tmp_path, "one")
    file = tmp_path / "adversarial" / "one.safetensors"
    save_file({name: torch.full((2,), torch.nan) for name in ("tensor_0", "tensor_1", "tensor_2", "tensor_3")}, file)
    with pytest.raises(EvaluationError, match="is not the file that the attack wrote"):
        restore(record, tmp_path)
    known = {**record["files"], "one.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()}
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        restore({**record, "files": known}, tmp_path)
    file.unlink()
    with pytest.raises(EvaluationError, match=r"one\.safetensors"):
        restore(record, tmp_path)


def test_changes_that_do_not_fit_a_model_are_refused(tiny_pipe_original: Any) -> None:
    wide = Words({"text_encoder": [3]}, {"text_encoder": torch.ones(1, 5)})
    for change, said in (
        (wide, "learned vectors of width 5 for the tokens .3., and the text_encoder has"),
        (AnotherSampler("AutoencoderKL"), "diffusers has no scheduler 'AutoencoderKL'"),
    ):
        with pytest.raises(EvaluationError, match=said), change(tiny_pipe_original):
            raise AssertionError("entered")
    with pytest.raises(EvaluationError, match="diffusers has no Img2Img pipeline"), AnotherTask("Img2Img")(
        SimpleNamespace()
    ):  # fmt: skip
        raise AssertionError("entered")
