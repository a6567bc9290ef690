"""Arguments of the wrong kind are refused by the name of what they should be, not in a library further down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import erasure
from erasure import Concept
from erasure.artifact import Erasure
from erasure.cli.main import main
from erasure.errors import AttachError, ConceptError, ErasureError, OptionError, UnsupportedModelError
from erasure.pipelines import StableDiffusionErasurePipeline

QUICK: dict[str, Any] = {"attach": False, "progress": False}


@pytest.fixture
def pipe(tiny_pipe_factory: Any) -> Any:
    made = StableDiffusionErasurePipeline.from_pipe(tiny_pipe_factory())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def made(tiny_pipe_factory: Any) -> Erasure:
    return erasure.erase(tiny_pipe_factory(), Concept("cat", anchor="dog"), "uce", **QUICK)


@pytest.mark.parametrize("given", [None, 5, b"cat", {"cat": "dog"}, ["cat", 5], [["cat"]], ["cat", None]])
def test_what_is_no_concept_is_refused(pipe: Any, given: Any) -> None:
    with pytest.raises(ConceptError, match=r"names no concept|is no text and no Concept"):
        erasure.erase(pipe, given, "uce", **QUICK)
    with pytest.raises(ConceptError, match=r"names no concept|is no text and no Concept"):
        erasure.concept.as_concepts(given)


def test_concepts_may_come_one_by_one(pipe: Any) -> None:
    assert erasure.erase(pipe, (word for word in ("cat", "dog")), "uce", **QUICK).name == "cat-dog-uce"


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "3", True, float("nan"), [1]])
def test_what_is_no_seed_is_refused_everywhere(pipe: Any, made: Erasure, seed: Any, tmp_path: Path) -> None:
    from erasure.eval import attack, audit, evaluate, stress_test

    pipe.load_erasure(made)
    for work in (
        lambda: erasure.erase(pipe, "cat", "uce", seed=seed, **QUICK),
        lambda: erasure.learn_concepts(pipe, Image.new("RGB", (32, 32)), "<cat>", seed=seed),
        lambda: evaluate(pipe, "canvas", seed=seed),
        lambda: attack(pipe, "random_prefix", seed=seed),
        lambda: stress_test(pipe, "noise", seed=seed),
        lambda: audit(pipe, out=tmp_path / "audit", seed=seed),
    ):
        with pytest.raises(OptionError, match=r"the seed is .*; allowed: a whole number"):
            work()


def test_a_seed_of_numpy_is_a_number(pipe: Any, tmp_path: Path) -> None:
    folder = erasure.erase(pipe, Concept("cat", anchor="dog"), "uce", seed=np.int64(3), **QUICK).save(tmp_path / "a")  # type: ignore[arg-type]
    assert Erasure.load(folder).config.seed == 3


def test_a_part_of_a_pipeline_is_no_pipeline(pipe: Any, made: Erasure) -> None:
    for part in (pipe.unet, None, "canvas-sd"):
        for work in (
            lambda part=part: erasure.erase(part, "cat", "uce", **QUICK),
            lambda part=part: erasure.load(part, made),
            lambda part=part: erasure.ErasureManager(part).verify(),
        ):
            with pytest.raises(UnsupportedModelError, match="is no pipeline of diffusers: pass the whole pipeline"):
                work()


@pytest.mark.parametrize("name", [3, "con", "NUL", "\u68b5" * 100, ("a",)])
def test_a_name_that_no_folder_can_have_is_refused_at_once(pipe: Any, made: Erasure, name: Any) -> None:
    with pytest.raises(AttachError, match="cannot name an erasure"):
        pipe.load_erasure(made, name=name)
    assert pipe.active_erasures() == []


def test_strengths_of_numpy_and_torch_are_numbers(pipe: Any, made: Erasure, tiny_pipe_factory: Any) -> None:
    other = erasure.erase(tiny_pipe_factory(), Concept("ink", anchor="photo"), "uce", **QUICK)
    pipe.load_erasure(made, name="a")
    pipe.load_erasure(other, name="b")
    for strengths in (np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), [np.float32(0.5), 0.25]):
        pipe.set_erasures(["a", "b"], strengths)
        assert pipe.erasure_manager.strengths == {"a": 0.5, "b": 0.25}
    with pytest.raises(AttachError, match="'a' is named twice"):
        pipe.set_erasures(["a", "a"], [0.1, 0.9])
    assert pipe.erasure_manager.strengths == {"a": 0.5, "b": 0.25}


def test_autocast_of_the_caller_changes_no_edit(pipe: Any, made: Erasure) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = pipe.erase(Concept("cat", anchor="dog"), "uce", progress=False)
        inside = pipe.verify_erasures()
    assert pipe.verify_erasures() == inside > 0
    assert again.edits.equals(made.edits)
    pipe.unload_erasures()
    pipe.load_erasure(made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pipe.verify_erasures() == inside


def drawing(folder: Path, out: Path, *options: str) -> list[str]:
    return ["generate", "--model", str(folder), "--device", "cpu", "--prompt", "a cat", "--out", str(out), *options]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1001"], "DDIMScheduler allows at most 1000"),
        (["--guidance", "nan"], "--guidance nan is no scale"), (["--guidance", "inf"], "--guidance inf is no scale"),
        (["--guidance", "-3"], "--guidance -3"), (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)  # fmt: skip
def test_numbers_and_devices_are_refused_before_anything_is_drawn(
    options: list[str], message: str, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(drawing(tiny_pipe_folder, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_of_a_file_are_refused_before_anything_is_drawn(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("prompt,height\na cat,33\n")
    assert main([*drawing(tiny_pipe_folder, tmp_path / "out"), "--prompt", str(listed)]) == 2
    assert "allowed are multiples of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unusable_device_is_told_by_the_library(tiny_pipe_folder: Path) -> None:
    for device in ("gpu", "cuda:99", 3.5):
        with pytest.raises(OptionError, match="cannot be used here"):
            erasure.load_pipeline(tiny_pipe_folder, device=device)  # type: ignore[arg-type]


def test_a_word_is_not_a_file_of_its_name(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that is the name of some file drew what stands in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").write_text("a secret\n")
    (tmp_path / "notes.md").write_text("a secret\n")
    command = ["generate", "--model", str(tiny_pipe_folder), "--device", "cpu", "--steps", "1", "--out", "out"]
    assert main([*command, "--prompt", "cat", "--json"]) == 0
    assert "secret" not in capsys.readouterr().out
    for text in ("notes.md", "./cat"):
        assert main([*command, "--prompt", text, "--overwrite"]) == 2
        assert "is a file, and a list ends with" in capsys.readouterr().err


def test_steps_of_a_suite_are_whole_and_few_enough(pipe: Any) -> None:
    from erasure.eval.inputs import Inputs
    from erasure.eval.suites.drawn import Drawing

    with pytest.raises(ErasureError, match=r"steps is 2\.5, allowed: a whole number"):
        Inputs(steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at most 1000"):
        Drawing.of(pipe, Inputs(steps=1001), None)
