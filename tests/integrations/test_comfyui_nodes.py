"""The nodes' interface as ComfyUI documents it, where erasures are found, and removing objects from an IMAGE."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import erasure
from erasure import Erasure
from erasure.errors import ArtifactError, MaskError, OptionError
from tests.behaviour.cases import fit
from tests.integrations.stand_ins import PROGRESS, loaded

TYPES = {"MODEL", "CLIP", "IMAGE", "MASK", "ERASURE", "STRING", "INT", "FLOAT", "BOOLEAN"}


@pytest.fixture(scope="session")
def saved(tiny_pipe_original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "cat-uce"
    fit(tiny_pipe_original, "uce").save(folder)
    return folder


@pytest.fixture
def below(saved: Path, models_dir: Path) -> Any:
    """The name of a folder below `models/erasures`."""
    shutil.copytree(saved, models_dir / "erasures/styles/cat")
    yield "styles/cat"
    shutil.rmtree(models_dir / "erasures/styles")


# The interface -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ErasureLoad", "ErasureApply", "ErasureVerify", "ErasureRemoveObject"])
def test_a_node_says_what_comfyui_asks(nodes: dict[str, Any], name: str) -> None:
    node = nodes[name]
    assert node.CATEGORY == "erasure"
    assert node.DESCRIPTION.endswith(".")
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    assert set(node.RETURN_TYPES) <= TYPES
    told = node.INPUT_TYPES()
    assert set(told) <= {"required", "optional"}
    taken = inspect.signature(getattr(node(), node.FUNCTION)).parameters
    assert set(taken) == {key for group in told.values() for key in group}
    for key in told["required"]:
        assert taken[key].default is inspect.Parameter.empty, "ComfyUI always gives it"
    for key in told.get("optional", {}):
        assert taken[key].default is not inspect.Parameter.empty, "ComfyUI leaves it out where nothing is connected"
    for kind, *settings in (each for group in told.values() for each in group.values()):
        assert kind in TYPES
        for options in settings:
            if "min" in options:
                assert options["min"] <= options["default"] <= options["max"]


def test_every_node_has_a_name_that_is_shown(pack: ModuleType, nodes: dict[str, Any]) -> None:
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes)
    assert len(nodes) == 4
    shown = {"Load Erasure", "Apply Erasure", "Verify Erasure", "Remove Object"}
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS.values()) == shown


def test_the_folder_of_erasures_is_registered(pack: ModuleType, models_dir: Path) -> None:
    paths = sys.modules["folder_paths"].get_folder_paths("erasures")  # type: ignore[attr-defined]
    assert paths == [str(models_dir / "erasures")]


# Loading -------------------------------------------------------------------------------------------------------------


def test_an_erasure_is_found_by_name_and_by_path(nodes: dict[str, Any], saved: Path, below: str) -> None:
    wanted = Erasure.read(saved)
    for source in (below, f" {below} ", str(saved)):
        assert nodes["ErasureLoad"].VALIDATE_INPUTS(source=source) is True
        found, summary = nodes["ErasureLoad"]().load(source)
        assert found.edits.equals(wanted.edits)
        assert "cat-uce: erases cat by uce" in summary
        assert "changes unet" in summary


@pytest.mark.parametrize("source", ["", "nothing-here", "/nothing/here", "../erasures", "a/b/c", "./x"])
def test_what_is_nowhere_is_said_before_anything_runs(nodes: dict[str, Any], source: str) -> None:
    told = nodes["ErasureLoad"].VALIDATE_INPUTS(source=source)
    assert "models/erasures" in told
    with pytest.raises(ArtifactError, match="models/erasures"):
        nodes["ErasureLoad"]().load(source)


def test_a_name_does_not_lead_out_of_the_folder(pack: ModuleType, models_dir: Path, saved: Path) -> None:
    places = sys.modules[f"{pack.__name__}.places"]
    shutil.copytree(saved, models_dir / "diffusers/secret")
    assert places.found_in("erasures", "../diffusers/secret") is None  # type: ignore[attr-defined]
    assert places.found_in("diffusers", "secret") == models_dir / "diffusers/secret"  # type: ignore[attr-defined]


def test_texts_of_other_nodes_are_checked_when_they_are_there(nodes: dict[str, Any]) -> None:
    assert nodes["ErasureLoad"].VALIDATE_INPUTS() is True


def test_a_damaged_erasure_is_refused(nodes: dict[str, Any], below: str, models_dir: Path) -> None:
    (models_dir / "erasures" / below / "erasure_config.json").write_text("{")
    with pytest.raises(ArtifactError):
        nodes["ErasureLoad"]().load(below)
    os.remove(models_dir / "erasures" / below / "erasure_config.json")
    with pytest.raises(ArtifactError, match=r"erasure_config.json is missing"):
        nodes["ErasureLoad"]().load(below)


def test_a_changed_file_makes_the_node_run_again(nodes: dict[str, Any], below: str, models_dir: Path) -> None:
    load = nodes["ErasureLoad"]
    before = load.IS_CHANGED(below)
    assert load.IS_CHANGED(below, "") == before
    file = models_dir / "erasures" / below / "erasure_config.json"
    os.utime(file, ns=(1, 1))
    assert load.IS_CHANGED(below) != before


def test_names_of_the_hub_and_revisions(
    nodes: dict[str, Any], saved: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(source: str, *, revision: str | None = None) -> Erasure:
        asked.append((source, revision))
        return Erasure.read(saved)

    monkeypatch.setattr(Erasure, "load", load)
    node = nodes["ErasureLoad"]
    assert node.VALIDATE_INPUTS(source="someone/no-cat") is True
    node().load("someone/no-cat", "v1 ")
    node().load("someone/no-cat")
    assert asked == [("someone/no-cat", "v1"), ("someone/no-cat", None)]
    assert node.IS_CHANGED("someone/no-cat", "v1") != node.IS_CHANGED("someone/no-cat", "v2")
    with pytest.raises(ArtifactError, match="has no revision"):
        node().load(below, "v1")


def test_a_workflow_from_a_folder_to_a_verified_model(
    nodes: dict[str, Any], saved: Path, tiny_pipe_original: Any
) -> None:
    model, clip = loaded(tiny_pipe_original)
    made, _ = nodes["ErasureLoad"]().load(str(saved))
    model, clip, _ = nodes["ErasureApply"]().apply(model=model, clip=clip, erasure=made, strength=1.0, check_base=True)
    assert "in force" in nodes["ErasureVerify"]().verify(model=model, clip=clip, erasure=made, strength=1.0)[2]


# Removing objects ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tiny_pipe_folder: Path, models_dir: Path) -> str:
    """The name of a model below `models/diffusers`."""
    shutil.copytree(tiny_pipe_folder, models_dir / "diffusers/tiny")
    return "tiny"


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> torch.Tensor:
    marked = torch.zeros(1, 32, 32)
    marked[:, 8:16, 8:20] = 1
    return marked


def remove(nodes: dict[str, Any], image: Any, model: str, **options: Any) -> Any:
    return nodes["ErasureRemoveObject"]().remove(image=image, **{"model": model, "seed": 3, "steps": 3, **options})


def test_an_object_is_removed_as_the_pipeline_removes_it(
    nodes: dict[str, Any], model: str, models_dir: Path, image: torch.Tensor, mask: torch.Tensor
) -> None:
    found, used = remove(nodes, image, model, mask=mask)
    assert (found.shape, found.dtype, used.shape, used.dtype) == (
        (2, 32, 32, 3), torch.float32, (2, 32, 32), torch.float32,
    )  # fmt: skip
    assert 0 <= found.min() <= found.max() <= 1
    assert torch.equal(used, mask.expand(2, -1, -1))
    pipe = erasure.load_pipeline(models_dir / "diffusers/tiny", task="object-removal", device="cpu")
    wanted = pipe(
        image.movedim(-1, 1), mask[0], num_inference_steps=3, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images  # fmt: skip
    torch.testing.assert_close(found, wanted.movedim(1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 28:], image[:, 28:], rtol=0, atol=1e-3)
    assert (found - image)[:, 8:16, 8:20].abs().max() > 0.01
    assert PROGRESS[-1].steps == sorted(PROGRESS[-1].steps) != []


def test_the_pipeline_is_kept_and_seeds_count(
    nodes: dict[str, Any], model: str, image: torch.Tensor, mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = erasure.load_pipeline
    monkeypatch.setattr(
        erasure, "load_pipeline", lambda *args, **options: loads.append(args) or load(*args, **options)
    )
    node = nodes["ErasureRemoveObject"]()
    first, again, other = (node.remove(image[:1], model, seed, 2, mask=mask)[0] for seed in (0, 0, 1))
    assert len(loads) == 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_words_are_looked_for_by_the_model(nodes: dict[str, Any], image: torch.Tensor, mask: torch.Tensor) -> None:
    """On a picture of noise the embedded model finds no cat, and says so with a score."""
    with pytest.raises(MaskError, match="cat"):
        remove(nodes, image[:1].repeat(1, 2, 2, 1), "canvas-sd", words="cat", others="dog, apple")


def test_an_interrupted_run_stops_and_the_next_one_works(
    nodes: dict[str, Any], model: str, image: torch.Tensor, mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptProcessingException(Exception):
        pass

    def stop() -> None:
        raise InterruptProcessingException

    node = nodes["ErasureRemoveObject"]()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["comfy.model_management"], "throw_exception_if_processing_interrupted", stop)
        with pytest.raises(InterruptProcessingException):
            node.remove(image, model, 3, 3, mask=mask)
    assert torch.equal(node.remove(image, model, 3, 3, mask=mask)[0], remove(nodes, image, model, mask=mask)[0])


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({}, MaskError, "say what to remove"),
        ({"words": " , \n"}, MaskError, "say what to remove"),
        ({"mask": torch.ones(1, 32, 32), "words": "cat"}, MaskError, "and not both"),
        ({"mask": torch.zeros(1, 32, 32)}, MaskError, "the MASK is empty"),
        ({"mask": torch.zeros(1, 64, 64)}, MaskError, "the MASK is empty"),
        ({"mask": torch.ones(1, 32, 32)}, MaskError, "covers the whole image"),
        ({"mask": torch.ones(3, 32, 32)}, MaskError, "3 masks for 2 images"),
        ({"mask": torch.ones(1, 32, 8)}, MaskError, "8x32 pixels for an image of 32x32"),
        ({"mask": torch.ones(1, 1, 32, 32)}, MaskError, "a MASK has the shape"),
        ({"mask": torch.full((1, 32, 32), float("nan"))}, MaskError, "NaN"),
        ({"image": torch.rand(1, 32, 32, 4), "words": "cat"}, MaskError, "split off its transparency"),
        ({"image": torch.rand(1, 3, 32, 32), "words": "cat"}, MaskError, "an IMAGE has the shape"),
        ({"image": torch.full((1, 32, 32, 3), float("nan")), "words": "cat"}, MaskError, "NaN or infinity"),
        ({"words": "cat", "steps": -1}, OptionError, "steps from 0 up"),
        ({"words": "cat", "seed": 2**64}, OptionError, "a seed from 0"),
        ({"words": "cat", "model": ""}, ArtifactError, "no model is named"),
        ({"words": "cat", "model": "nothing-here"}, ArtifactError, "nothing-here"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    nodes: dict[str, Any], model: str, image: torch.Tensor, options: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        remove(nodes, **{"image": image, "model": model, **options})
