"""Erased models as single files: diffusers reads them back to the last bit, and draws the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erasure import Erasure, ErasureManager, assets, erase, load_pipeline
from erasure.backbones import backbone_for
from erasure.backbones.layouts import Layout, flux_layout, starts, to_original, unformed
from erasure.errors import ArtifactError, UnsupportedModelError
from erasure.exchange import checkpoints
from erasure.exchange.checkpoints import export_checkpoint, parts_of, tensors_of
from tests.copies import copied

FAMILIES = {
    "stable-diffusion": ["unet", "vae", "text_encoder"],
    "stable-diffusion-xl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "stable-diffusion-3": ["transformer"],
    "flux": ["transformer"],
}


@pytest.fixture(scope="module")
def originals(tiny_models: Any) -> dict[str, Any]:
    return {family: tiny_models[family]() for family in (*FAMILIES, "chroma")}


def made_for(pipe: Any, strategy: str = "uce", **options: Any) -> Erasure:
    return erase(pipe, "cat", strategy, vocabulary=8, attach=False, progress=False, **options)


def from_original(
    tensors: dict[str, torch.Tensor], rows: dict[str, int], layout: Layout, prefix: str
) -> dict[str, torch.Tensor]:
    """A network's parameters from the tensors of a file: the inverse of `to_original`.

    `rows` has how many rows each parameter has, by its canonical path.
    """
    first, found = starts(rows, layout), {}
    for path, count in rows.items():
        place = layout(path)
        assert place is not None, path
        tensor = tensors[prefix + place.key]
        part = tensor[first[path] : first[path] + count] if place.parts > 1 else tensor
        found[path] = unformed(part, place.form)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_reads_back(
    originals: dict[str, Any], family: str, tensors_of: Any, changed_tensors: Any, tmp_path: Path
) -> None:
    pipe = copied(originals[family])
    before, erasure, path = tensors_of(pipe), made_for(pipe), tmp_path / "erased.safetensors"
    written = export_checkpoint(erasure, pipe, path)
    assert list(written.components) == FAMILIES[family]
    assert not changed_tensors(before, pipe), "the pipeline is as it was"
    ErasureManager(pipe).add(erasure)
    held = load_file(path)
    for part in parts_of(pipe):
        expected = checkpoints.tensors_of(pipe, part.component)
        rows = {key: len(tensor) for key, tensor in expected.items()}
        # A transposed tensor's rows are the file's columns.
        read = from_original(held, rows, part.layout, part.prefix)
        assert all(torch.equal(read[key], tensor) for key, tensor in expected.items())
    assert len(held) == written.tensors
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["erasures"])
    assert [one["config"]["concepts"][0]["target"] for one in told] == ["cat"]


def test_flux_of_full_width_reads_back_with_the_conversion_of_diffusers() -> None:
    """Which splits tensors at 3072 rows, whatever their size: narrow ones of as many rows stand in for the model's."""
    with torch.device("meta"):
        whole = FluxTransformer2DModel(guidance_embeds=True, num_layers=2, num_single_layers=3)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(len(value), *(2 for _ in value.shape[1:]), generator=generator)
        for name, value in whole.state_dict().items()
    }
    written = to_original(state, flux_layout)
    read = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(written))
    assert set(read) == set(state)
    assert all(torch.equal(read[name], value) for name, value in state.items())


STOCK = {"canvas-sd": StableDiffusionPipeline, "canvas-sdxl": StableDiffusionXLPipeline}


@pytest.mark.parametrize("model", STOCK)
def test_the_stock_pipeline_draws_the_same_from_the_file(model: str, tmp_path: Path) -> None:
    pipe = load_pipeline(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    erasure = made_for(pipe)
    export_checkpoint(erasure, pipe, tmp_path / "erased.safetensors")
    stock = STOCK[model].from_single_file(tmp_path / "erased.safetensors", config=str(assets.path(model)))
    stock.set_progress_bar_config(disable=True)

    def draw(drawing: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        made = drawing("a photo of a cat", num_inference_steps=2, generator=generator, output_type="np")
        return torch.from_numpy(made.images[0])

    plain = draw(pipe)
    ErasureManager(pipe).add(erasure)
    assert torch.equal(draw(stock), draw(pipe))
    assert not torch.equal(draw(stock), plain)
    if model == "canvas-sd":  # diffusers tells SDXL by a block that only a text encoder of full depth has
        again = load_pipeline(tmp_path / "erased.safetensors", device="cpu", config=assets.path(model))
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), draw(pipe))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_file_of_the_transformer_alone_draws_with_the_other_parts_of_its_model(
    originals: dict[str, Any], tmp_path: Path, draw: Any, same_picture: Any, variant: str | None
) -> None:
    """Of SD3 the transformer is published alone: the configs, text encoders and autoencoder are the folder's."""
    pipe = copied(originals["stable-diffusion-3"])
    pipe.save_pretrained(tmp_path / "model", variant=variant)
    assert (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").exists() == (variant is None)
    erasure, path = made_for(pipe), tmp_path / "erased.safetensors"
    export_checkpoint(erasure, pipe, path)
    again = load_pipeline(path, device="cpu", config=tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    ErasureManager(pipe).add(erasure)
    same_picture(draw(again), draw(pipe))
    assert (draw(again) - plain).abs().max() > 1e-3


def test_a_file_that_lacks_tensors_is_refused(originals: dict[str, Any], tmp_path: Path) -> None:
    pipe = originals["stable-diffusion"]
    pipe.save_pretrained(tmp_path / "model")
    path = tmp_path / "erased.safetensors"
    export_checkpoint(made_for(pipe), pipe, path)
    held = load_file(path)
    del held["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(held, path)
    with pytest.raises(ArtifactError, match=r"lacks 1 tensors .*first text_encoder/.*layers.0.mlp.fc1.weight"):
        load_pipeline(path, device="cpu", config=tmp_path / "model")


def test_what_a_file_cannot_hold_is_refused(originals: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "erased.safetensors"
    chroma = originals["chroma"]
    with pytest.raises(UnsupportedModelError, match=r"chroma .*not known here: pipe.save_erased_pipeline"):
        export_checkpoint(made_for(chroma), chroma, path)
    flux = originals["flux"]
    with pytest.raises(UnsupportedModelError, match=r"changes the text_encoder.* holds the transformer only"):
        export_checkpoint(made_for(flux, "diff_quickfix"), flux, path)
    plain = originals["stable-diffusion"]
    sld = erase(plain, "cat", "sld", attach=False, progress=False)
    with pytest.raises(UnsupportedModelError, match="guides the denoiser"):
        export_checkpoint(sld, plain, path)
    assert not list(tmp_path.iterdir())


def test_a_stable_diffusion_of_the_second_kind_is_refused(originals: Any, monkeypatch: Any, tmp_path: Path) -> None:
    plain = originals["stable-diffusion"]
    erasure = made_for(plain)
    monkeypatch.setattr(checkpoints, "_width", lambda module: 1024)
    with pytest.raises(UnsupportedModelError, match=r"Stable Diffusion 2.x holds the last block"):
        export_checkpoint(erasure, plain, tmp_path / "erased.safetensors")


def test_what_would_not_read_back_is_not_written(originals: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """And a file that it would have replaced is still there."""
    plain = originals["stable-diffusion"]
    erasure, path = made_for(plain), tmp_path / "erased.safetensors"
    path.write_bytes(b"mine")
    right = checkpoints.single_files.converted

    def wrong(*args: Any) -> Any:
        read = right(*args)
        assert read is not None
        first = next(iter(read))
        return {**read, first: read[first] + 1}

    monkeypatch.setattr(checkpoints.single_files, "converted", wrong)
    with pytest.raises(ArtifactError, match=r"would not read back as the model has it \(first"):
        export_checkpoint(erasure, plain, path, overwrite=True)
    assert path.read_bytes() == b"mine"
    assert not ErasureManager(plain).erasures
    with pytest.raises(ArtifactError, match="exists"):
        export_checkpoint(erasure, plain, path)


def test_a_parameter_without_a_place_is_named(originals: dict[str, Any]) -> None:
    backbone = backbone_for(originals["flux"])
    layout = backbone.published_layout(backbone.denoiser)
    assert layout is not None
    state = tensors_of(originals["flux"], "transformer")
    with pytest.raises(KeyError, match="strange"):
        to_original({**state, "strange.weight": torch.ones(1)}, layout)
    del state["transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(KeyError, match=r"double_blocks.0.img_attn.qkv.weight, part 1"):
        to_original(state, layout)
