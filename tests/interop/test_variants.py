"""Variants of weights: which one a folder has alone, and that models are loaded from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import erasure
from erasure.cli.main import main
from erasure.errors import ArtifactError
from erasure.interop.variants import only_variant


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], None),
        (["unet/diffusion_pytorch_model.safetensors"], None),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"], None),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"], "fp16"),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"], "fp16"),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.bf16.safetensors"], None),
        (["unet/model.fp16.safetensors", "unet/model.bf16.safetensors", "vae/model.bf16.safetensors"], "bf16"),
        (["text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"], None),
        (["text_encoder/model.fp16-00001-of-00002.safetensors"], "fp16"),
        (["text_encoder/model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["unet/adapter_model.fp16.safetensors", "unet/model.fp16.bin", "model.fp16.safetensors"], None),
    ],
)
def test_the_only_variant_of_a_folder(tmp_path: Path, files: list[str], expected: str | None) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert only_variant(tmp_path) == expected


def test_several_variants_are_named(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    model = tmp_path / "model"
    for variant in ("fp16", "bf16"):
        pipe.save_pretrained(model, variant=variant)
    for load in (erasure.load_pipeline, erasure.api.load_text_encoders):  # type: ignore[attr-defined]
        with pytest.raises(ArtifactError, match=r"variants bf16 and fp16 and no usual ones.*variant='bf16'"):
            load(model, device="cpu")
    drawing = ["generate", "--device", "cpu", "--prompt", "a cat", "--steps", "1", "--out", str(tmp_path / "drawn")]
    assert main([*drawing, "--model", str(model)]) != 0
    assert "bf16 and fp16" in capsys.readouterr().err
    chosen = erasure.load_pipeline(model, device="cpu", variant="bf16")
    chosen.save_pretrained(tmp_path / "other")
    assert main([*drawing, "--model", str(tmp_path / "other")]) == 0


def test_nothing_is_known_of_a_hub_id() -> None:
    assert only_variant("owner/model") is None


@pytest.mark.parametrize("size", ["10GB", "30KB"])
def test_variants_and_parts_of_weights(
    size: str, tiny_pipe_folder: Path, tiny_pipe_original: Any, tensors_of: Any, tmp_path: Path
) -> None:
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    stock, other = tensors_of(tiny_pipe_original), tmp_path / "model"
    pipe.save_pretrained(other, variant="fp16", max_shard_size=size)
    assert (len(list((other / "text_encoder").glob("*.safetensors"))) > 1) == (size == "30KB")
    for found in (erasure.load_pipeline(other, device="cpu"), erasure.load_pipeline(tiny_pipe_folder, device="cpu")):
        assert all(torch.equal(value, tensors_of(found)[key]) for key, value in stock.items())
    encoder = erasure.api.load_text_encoders(other, device="cpu").text_encoder  # type: ignore[attr-defined]
    assert torch.equal(next(encoder.parameters()), next(pipe.text_encoder.parameters()))


def test_a_variant_is_named_where_there_are_several(tiny_pipe_folder: Path, tmp_path: Path) -> None:
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    pipe.save_pretrained(tmp_path / "model", variant="fp16")
    with torch.no_grad():
        next(pipe.unet.parameters()).zero_()
    pipe.save_pretrained(tmp_path / "model")
    for variant, empty in ((None, True), ("fp16", False)):
        found = erasure.load_pipeline(tmp_path / "model", device="cpu", variant=variant)
        assert (next(found.unet.parameters()) == 0).all().item() == empty


def test_commands_open_a_folder_with_one_variant_alone(
    tiny_pipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu", dtype=torch.float16)
    pipe.save_pretrained("model", variant="fp16")
    assert all(".fp16." in file.name for file in Path("model").rglob("*.safetensors"))
    model = ["--model", "model", "--device", "cpu"]
    assert main(["erase", "uce", *model, "--concept", "cat", "--vocabulary", "4", "--out", "cat"]) == 0
    drawing = ["generate", *model, "--erasure", "cat", "--prompt", "a cat", "--steps", "1"]
    assert main([*drawing, "--out", "drawn"]) == 0
    Path("prompts.txt").write_text("a cat\na dog\n")
    training = ["sae", "train", "--prompts", "prompts.txt", "--steps", "1", "--d-sae", "64", "--k", "4"]
    assert main([*training, *model, "--out", "sae"]) == 0  # the text encoders alone
