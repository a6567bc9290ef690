"""Learned concepts on disk and in pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import erasure
from erasure.cache import model_fingerprint
from erasure.errors import ArtifactError, ConceptError, WrongBaseError
from erasure.learning import LearnedConcepts
from erasure.learning import concepts as concepts_module
from erasure.learning.concepts import CONFIG_FILE, VECTORS_FILE, loaded, unload
from tests.models import make_tiny_pipe, make_tiny_xl


@pytest.fixture
def folder(concepts: LearnedConcepts, tmp_path: Path) -> Path:
    return concepts.save(tmp_path / "logo")


def test_what_is_saved_is_read(concepts: LearnedConcepts, folder: Path) -> None:
    found = LearnedConcepts.read(folder)
    assert found.config == concepts.config
    assert torch.equal(found.vectors["text_encoder"]["<logo>"], concepts.vectors["text_encoder"]["<logo>"])
    assert found.edits.equals(concepts.edits)
    assert sum(file.stat().st_size for file in folder.iterdir()) == concepts.size_bytes
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}


def test_loading_teaches_and_unloading_forgets_bit_for_bit(tiny_pipe: Any, folder: Path) -> None:
    before, ids = model_fingerprint(tiny_pipe), tiny_pipe.tokenizer("a photo of <logo>").input_ids
    table = tiny_pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    found = LearnedConcepts.read(folder)
    found.load_into(tiny_pipe)
    assert [one.tokens for one in loaded(tiny_pipe)] == [["<logo>"]]
    assert model_fingerprint(tiny_pipe) != before
    unload(tiny_pipe)
    assert model_fingerprint(tiny_pipe) == before
    assert tiny_pipe.tokenizer("a photo of <logo>").input_ids == ids
    assert torch.equal(tiny_pipe.text_encoder.get_input_embeddings().weight, table)
    with pytest.raises(ConceptError, match="no learned concept"):
        unload(tiny_pipe)


@pytest.mark.parametrize("fails", ["put_in", "_write"])
def test_what_is_interrupted_while_it_is_loaded_leaves_nothing(
    tiny_pipe: Any, folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ids = model_fingerprint(tiny_pipe), tiny_pipe.tokenizer("a photo of <logo>").input_ids
    whole, calls = getattr(concepts_module, fails), []

    def interrupted(*args: Any) -> None:
        whole(*args)
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(concepts_module, fails, interrupted)
    with pytest.raises(KeyboardInterrupt):
        LearnedConcepts.read(folder).load_into(tiny_pipe)
    assert model_fingerprint(tiny_pipe) == before
    assert tiny_pipe.tokenizer("a photo of <logo>").input_ids == ids
    assert loaded(tiny_pipe) == []


def test_unloading_that_is_interrupted_can_be_done_again(
    tiny_pipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model_fingerprint(tiny_pipe)
    LearnedConcepts.read(folder).load_into(tiny_pipe)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(concepts_module, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unload(tiny_pipe)
    unload(tiny_pipe)
    assert model_fingerprint(tiny_pipe) == before


def test_the_methods_of_pipelines_load_and_unload(folder: Path) -> None:
    from erasure.pipelines import StableDiffusionErasurePipeline

    pipe = StableDiffusionErasurePipeline(**make_tiny_pipe().components, requires_safety_checker=False)
    pipe.load_concepts(folder)
    assert pipe.list_concepts() == ["<logo>"]
    pipe.unload_concepts()
    assert pipe.list_concepts() == []


@pytest.mark.parametrize("make", [lambda: make_tiny_pipe(seed=1), make_tiny_xl], ids=["weights", "family"])
def test_another_model_is_refused_and_left_alone(make: Any, concepts: LearnedConcepts) -> None:
    pipe = make()
    before = model_fingerprint(pipe)
    with pytest.raises(WrongBaseError, match="were learned with"):
        concepts.load_into(pipe)
    assert model_fingerprint(pipe) == before


def test_half_precision_of_the_same_model_is_the_same_model(concepts: LearnedConcepts) -> None:
    pipe = make_tiny_pipe().to(torch.float16)
    concepts.load_into(pipe)
    assert loaded(pipe)


def test_an_erasure_of_the_taught_model_needs_it(tiny_pipe: Any, concepts: LearnedConcepts) -> None:
    concepts.load_into(tiny_pipe)
    made = erasure.erase(tiny_pipe, "<logo>", "uce", progress=False, attach=False)
    erasure.load(tiny_pipe, made)
    with pytest.raises(WrongBaseError):
        erasure.load(make_tiny_pipe(), made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": []}, "tokens"),
        ({"tokens": ["<logo>", "<b>"]}, "does not go with"),
        ({"more": 1}, "more"),
        ({"format_version": 9}, "upgrade"),
        ({"base": {"parts": {}}}, "does not go with"),
        ({"options": {"a": float("nan")}}, "concepts_config"),
    ],
    ids=str,
)
def test_a_changed_config_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    data = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**data, **change}))
    with pytest.raises(ArtifactError, match=said):
        LearnedConcepts.read(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    rows = load_file(folder / VECTORS_FILE)
    save_file({key: torch.full_like(part, value) for key, part in rows.items()}, folder / VECTORS_FILE)
    with pytest.raises(ArtifactError):
        LearnedConcepts.read(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, VECTORS_FILE])
def test_a_missing_file_is_said(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        LearnedConcepts.read(folder)


def test_what_is_no_such_folder_is_said(tmp_path: Path, concepts: LearnedConcepts) -> None:
    with pytest.raises(ArtifactError, match="check the path"):
        LearnedConcepts.read(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="choose another folder"):
        concepts.save(tmp_path, overwrite=True)
    concepts.save(tmp_path / "new")
    with pytest.raises(ArtifactError, match="overwrite"):
        concepts.save(tmp_path / "new")
    concepts.save(tmp_path / "new", overwrite=True)
