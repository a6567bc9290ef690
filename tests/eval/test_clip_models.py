"""CLIP models of both layouts: recognised, compared with the libraries' own calls, named, and refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from erasure import assets
from erasure.errors import ArtifactError
from erasure.eval.metrics.clip_score import ClipModel

PROMPTS = ["a cat", "a dog in ink style", "word " * 100]


@pytest.fixture(scope="session")
def clip_of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of transformers with random weights, with its tokenizer and processor."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(assets.path("canvas-clip"))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {**small, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    folder = tmp_path_factory.mktemp("clip-of-transformers")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(32, 32, 3), (40, 64, 3), (64, 48, 3)]
    return [Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for size in sizes]


def test_features_are_those_of_transformers(clip_of_transformers: Path) -> None:
    model = ClipModel(clip_of_transformers)
    assert model.width == 16
    own = CLIPModel.from_pretrained(clip_of_transformers).eval()
    processor = CLIPImageProcessor.from_pretrained(clip_of_transformers)
    tokenizer = AutoTokenizer.from_pretrained(clip_of_transformers)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        seen = own.vision_model(**processor(pictures(), return_tensors="pt")).pooler_output
        read = own.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        images, texts = own.visual_projection(seen), own.text_projection(read)
    np.testing.assert_allclose(model.images(pictures()), images.numpy(), atol=1e-5)
    np.testing.assert_allclose(model.texts(PROMPTS), texts.numpy(), atol=1e-5)
    # One by one, so that nothing depends on its company.
    np.testing.assert_allclose(ClipModel(clip_of_transformers).texts(PROMPTS[:1]), texts[:1].numpy(), atol=1e-5)


def test_weights_in_several_files_are_read(clip_of_transformers: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_of_transformers, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    CLIPModel.from_pretrained(clip_of_transformers).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    one, many = ClipModel(clip_of_transformers), ClipModel(tmp_path / "sharded")
    np.testing.assert_array_equal(one.texts(["a cat"]), many.texts(["a cat"]))
    next(iter((tmp_path / "sharded").glob("*-of-*.safetensors"))).unlink()
    with pytest.raises(ArtifactError, match=r"\.safetensors"):
        ClipModel(tmp_path / "sharded")


def test_a_model_is_named_by_what_it_is(clip_of_transformers: Path, clip_folder: Path, tmp_path: Path) -> None:
    assert ClipModel("canvas-clip").name == "canvas-clip"
    # Known by its content, wherever that lies; and no other is called so, whatever its folder's name.
    copy = tmp_path / "mine"
    shutil.copytree(assets.path("canvas-clip"), copy)
    assert ClipModel(copy).name == "canvas-clip"
    shutil.copytree(clip_folder, tmp_path / "canvas-clip")
    model = ClipModel(tmp_path / "canvas-clip")
    assert model.name == f"canvas-clip@{model.fingerprint[:8]}"
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text()) | {"model_max_length": 16}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert ClipModel(copy).name.startswith("mine@")
    strange = tmp_path / "a [b] | c"
    shutil.copytree(clip_of_transformers, strange)
    assert ClipModel(strange).name == f"a-b-c@{ClipModel(clip_of_transformers).fingerprint[:8]}"


def test_a_repository_of_the_hub_is_found_in_its_cache(
    clip_of_transformers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny-clip"
    shutil.copytree(clip_of_transformers, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    model = ClipModel("someone/tiny-clip")
    assert model.name == f"someone/tiny-clip@{model.fingerprint[:8]}"
    assert model.texts(["a cat"]).shape == (1, 16)
    with pytest.raises(ArtifactError, match="'someone/other' is no folder here, and the Hub does not give it"):
        ClipModel("someone/other")


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_pickled, "expected open_clip_config.json and open_clip_model.safetensors, or config.json and model.saf"),
        (_without("config.json"), "none of transformers"),
        (_config(model_type="siglip"), "a model of the type 'siglip', expected a whole CLIP model"),
        (_config(model_type="clip", projection_dim=None), "expected a whole CLIP model"),
        (_config(model_type=3), "model_type"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors"),
    ],
)
def test_what_is_no_clip_model_is_refused_at_once(
    damage: Any, said: str, clip_of_transformers: Path, tmp_path: Path
) -> None:
    shutil.copytree(clip_of_transformers, tmp_path / "clip")
    damage(tmp_path / "clip")
    with pytest.raises(ArtifactError, match=said):
        ClipModel(tmp_path / "clip")


def test_weights_that_lack_tensors_are_not_made_up(clip_of_transformers: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_of_transformers, tmp_path / "clip")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lack .*visual_projection"):
        ClipModel(tmp_path / "clip").images(pictures())


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for source, said in (
        (tmp_path / "file", "is a file"),
        ("nothing", "neither a folder"),
        (tmp_path / "x", "neither"),
    ):
        with pytest.raises(ArtifactError, match=said):
            ClipModel(source)
