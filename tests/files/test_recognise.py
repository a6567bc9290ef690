"""Files and folders that are named as a model or an erasure and are neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import erasure
from erasure import Erasure
from erasure.cli.main import main
from erasure.errors import ArtifactError
from erasure.files import advice

KINDS = {
    "a single-file checkpoint": ("model.diffusion_model.input_blocks.0.0.weight", "load_pipeline"),
    "a LoRA": ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "load_lora_weights"),
    "a LoRA: ": ("unet.down_blocks.0.attentions.0.lora_A.weight", "load_lora_weights"),
    "a dictionary": ("W_dec", "--dictionary"),
    "a learned token": ("emb_params", "load_textual_inversion"),
    "one component": ("down_blocks.0.resnets.0.conv1.weight", "model_index.json"),
    "of no kind that is known": ("x", "save_pretrained"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_file_is_called_what_it_is(tmp_path: Path, kind: str, capsys: Any) -> None:
    name, what_to_do = KINDS[kind]
    path = tmp_path / "some.safetensors"
    save_file({name: torch.zeros(2)}, path)
    # `load_pipeline` reads these; see the tests of loading.
    is_model = kind == "a single-file checkpoint"
    for read in (Erasure.load, Erasure.read, *(() if is_model else (erasure.load_pipeline,))):
        with pytest.raises(ArtifactError) as refused:
            read(path)
        assert kind in str(refused.value)
        assert what_to_do in str(refused.value)
    for options in (["--model", str(path)], ["--model", "canvas-sd", "--erasure", str(path)])[is_model:]:
        assert main(["generate", *options, "--prompt", "a cat", "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert kind in said
        assert what_to_do in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.ckpt", b"x", "a .ckpt file, which may hold a pickle"), ("a.pt", b"x", "pickle"),
        ("a.png", b"x", "a file: name a folder"),
        ("a.safetensors", b"x", "a damaged file"), ("a", b"", "a file: name a folder"),
    ],
)  # fmt: skip
def test_other_files_are_told_too(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (Erasure.load, erasure.load_pipeline):
        with pytest.raises(ArtifactError, match=said):
            read(path)


def test_models_and_erasures_are_told_apart(tiny_pipe: Any, tiny_pipe_folder: Path, tmp_path: Path) -> None:
    made = erasure.erase(tiny_pipe, "cat", "uce", attach=False, progress=False).save(tmp_path / "made")
    with pytest.raises(ArtifactError, match="is no model of diffusers, but an erasure: name it as --erasure"):
        erasure.load_pipeline(made)
    with pytest.raises(ArtifactError, match=r"is no erasure.*it is a model: name it as --model"):
        Erasure.load(tiny_pipe_folder)
    for path in (
        made / "erasure_config.json",
        next(made.glob("*.safetensors")),
        tiny_pipe_folder / "model_index.json",
    ):
        assert advice(path) == f"a file: give the folder that holds it, {path.parent}"
    assert advice(tmp_path / "none") is None
    assert advice(tmp_path) is None
