"""What others publish, in the forms in which they publish it: the edit that comes out is the one that was made."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from erasure import Concept, Erasure, ErasureManager, erase
from erasure.errors import OptionError
from erasure.exchange.importing import Imported, import_file
from erasure.interop import paths

CAT = [Concept("cat")]
FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux")
ATTENTION = "mid_block.attentions.0.transformer_blocks.0"
KEY, VALUE = f"{ATTENTION}.attn2.to_k", f"{ATTENTION}.attn2.to_v"


@pytest.fixture(scope="module")
def pipes(tiny_models: Any) -> dict[str, Any]:
    return {family: tiny_models[family]() for family in FAMILIES}


@pytest.fixture
def noise() -> Any:
    """Gives tensors of random values."""
    generator = torch.Generator().manual_seed(2)
    return lambda *shape: 0.1 * torch.randn(*shape, generator=generator)


def weight(pipe: Any, component: str, path: str) -> torch.Tensor:
    return paths.parameter(getattr(pipe, component), path).detach()


def check(read: Imported, pipe: Any, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Attached from its folder, an erasure makes of the model's parameters what is expected of them."""
    erasure = Erasure.read(read.erasure.save(tmp_path / "imported"))
    assert erasure.config.strategy == "imported"
    copied = copy.deepcopy(pipe)
    manager = ErasureManager(copied)
    manager.add(erasure)
    assert manager.verify()
    assert set(erasure.edits.parameters) == set(expected)
    for key, value in expected.items():
        component, path = key.split("/", 1)
        torch.testing.assert_close(weight(copied, component, path), value.float(), rtol=0, atol=1e-6)


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_esd_and_uce(pipes: Any, noise: Any, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Trained tensors by the paths of diffusers; what rounding alone changed counts as unchanged."""
    pipe = pipes[family]
    held = {f"{path}.weight": weight(pipe, "unet", f"{path}.weight") for path in (KEY, VALUE)}
    held[f"{KEY}.weight"] = held[f"{KEY}.weight"] + noise(*held[f"{KEY}.weight"].shape)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in held.items()}, tmp_path / "esd.safetensors")
    read = import_file(tmp_path / "esd.safetensors", pipe, CAT)
    assert read.form == "weights"
    assert read.notes == ("1 of 2 tensors are as in the model",)
    assert "does not name its base model" in read.base
    stock, value = weight(pipe, "unet", f"{KEY}.weight"), held[f"{KEY}.weight"].to(dtype)
    expected = torch.where(stock.to(dtype) == value, stock, value.float())
    check(read, pipe, {f"unet/{KEY}.weight": expected}, tmp_path)


def test_uce_of_flux(pipes: Any, noise: Any, tmp_path: Path) -> None:
    pipe = pipes["flux"]
    doors = ("context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight")
    held = {path: weight(pipe, "transformer", path) for path in doors}
    held = {path: (tensor + noise(*tensor.shape)).contiguous() for path, tensor in held.items()}
    save_file(held, tmp_path / "uce.safetensors")
    read = import_file(tmp_path / "uce.safetensors", pipe, CAT)
    check(read, pipe, {f"transformer/{path}": tensor for path, tensor in held.items()}, tmp_path)


@pytest.mark.parametrize("name", ["delta.bin", "delta.pt"])
def test_concept_ablation_and_doco(pipes: Any, noise: Any, name: str, tmp_path: Path) -> None:
    pipe = pipes["stable-diffusion"]
    stock = weight(pipe, "unet", f"{KEY}.weight")
    held = stock + noise(*stock.shape)
    torch.save({"unet": {f"{KEY}.weight": held}, "modifier_token": {}, "step": 3}, tmp_path / name)
    check(import_file(tmp_path / name, pipe, CAT), pipe, {f"unet/{KEY}.weight": held}, tmp_path)


def test_concept_ablation_in_the_published_layout(pipes: Any, noise: Any, tmp_path: Path) -> None:
    pipe = pipes["stable-diffusion"]
    stock = weight(pipe, "unet", f"{KEY}.weight")
    held = stock + noise(*stock.shape)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    torch.save({"state_dict": {name: held}}, tmp_path / "delta.ckpt")
    check(import_file(tmp_path / "delta.ckpt", pipe, CAT), pipe, {f"unet/{KEY}.weight": held}, tmp_path)


@pytest.mark.parametrize("prefix", ["", "text_model.", "text_encoder.text_model."])
def test_advunlearn(pipes: Any, noise: Any, prefix: str, tmp_path: Path) -> None:
    """A whole text encoder, as transformers saves it or in the wrapper that repeats its tensors."""
    pipe = pipes["stable-diffusion"]
    state = {name: tensor.clone() for name, tensor in pipe.text_encoder.state_dict().items()}
    changed = "encoder.layers.1.mlp.fc1.weight"
    state[changed] = state[changed] + noise(*state[changed].shape)
    held = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    held[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    if prefix.startswith("text_encoder"):
        held |= {name.replace("embeddings.", "embedding."): tensor.clone() for name, tensor in state.items()}
    save_file(held, tmp_path / "model.safetensors")
    read = import_file(tmp_path / "model.safetensors", pipe, CAT)
    assert read.erasure.config.protects == "hosted pipeline"
    assert "1 tensors that no erasure changes were left aside" in read.notes[0]
    check(read, pipe, {f"text_encoder/{changed}": state[changed]}, tmp_path)


def test_text_encoders_of_one_size_ask_which(pipes: Any, noise: Any, tmp_path: Path) -> None:
    pipe = pipes["stable-diffusion-xl"]
    name = "encoder.layers.1.mlp.fc1.weight"
    held = weight(pipe, "text_encoder_2", name) + noise(64, 32)
    save_file({f"text_model.{name}": held}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match=r"several networks \(text_encoder, text_encoder_2\).*--component"):
        import_file(tmp_path / "model.safetensors", pipe, CAT)
    with pytest.raises(OptionError, match="no network 'vae'"):
        import_file(tmp_path / "model.safetensors", pipe, CAT, component="vae")
    read = import_file(tmp_path / "model.safetensors", pipe, CAT, component="text_encoder_2")
    check(read, pipe, {f"text_encoder_2/{name}": held}, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints(pipes: Any, family: str, tmp_path: Path) -> None:
    """An erased model in the published layout gives the erasure back, and says what it left aside.

    The file of SD3 holds the table of its places, which no erasure changes.
    """
    from erasure.exchange.checkpoints import export_checkpoint

    pipe = pipes[family]
    erasure = erase(pipe, "cat", "uce", vocabulary=8, attach=False, progress=False)
    export_checkpoint(erasure, pipe, tmp_path / "erased.safetensors")
    read = import_file(tmp_path / "erased.safetensors", pipe)
    assert [concept.target for concept in read.erasure.concepts] == ["cat"]
    copied = copy.deepcopy(pipe)
    ErasureManager(copied).add(erasure)
    keys = [key.split("/", 1) for key in erasure.edits.parameters]
    check(read, pipe, {f"{part}/{path}": weight(copied, part, path) for part, path in keys}, tmp_path)
    assert ("left aside" in " ".join(read.notes)) == (family != "flux")


# LoRA ----------------------------------------------------------------------------------------------------------------


def factors(pipe: Any, component: str, path: str, noise: Any, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    out, into = weight(pipe, component, f"{path}.weight").shape[:2]
    return noise(rank, into), noise(out, rank)


def edited(pipe: Any, component: str, path: str, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    stock = weight(pipe, component, f"{path}.weight")
    return {f"{component}/{path}.weight": stock + delta.view(stock.shape)}


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_leco_and_sliders(pipes: Any, noise: Any, ending: str, tmp_path: Path) -> None:
    """Rank 4, alpha 1: a quarter of the product."""
    pipe = pipes["stable-diffusion"]
    stem = f"lora_unet_{KEY.replace('.', '_')}"
    down, up = factors(pipe, "unet", KEY, noise)
    held = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    path = tmp_path / f"slider{ending}"
    if ending == ".pt":
        torch.save(held, path)
    else:
        save_file(held, path, {"ss_base_model_version": "sd_v1", "ss_sd_model_name": "v1-5-pruned.ckpt"})
    read = import_file(path, pipe, CAT)
    assert read.form == "lora"
    assert read.erasure.low_rank[f"unet/{KEY}"].down.shape == (4, 32)
    assert ("v1-5-pruned.ckpt" in read.base) == (ending != ".pt")
    check(read, pipe, edited(pipe, "unet", KEY, up @ down / 4), tmp_path)


def test_spm(pipes: Any, noise: Any, tmp_path: Path) -> None:
    """Rank 1 in linear layers and convolutions, also of 3x3."""
    pipe = pipes["stable-diffusion"]
    kinds = {KEY: (), f"{ATTENTION.removesuffix('.transformer_blocks.0')}.proj_in": (1, 1),
             "mid_block.resnets.0.conv1": (3, 3)}  # fmt: skip
    held, expected = {}, {}
    for path, kernel in kinds.items():
        out, into = weight(pipe, "unet", f"{path}.weight").shape[:2]
        down, up = noise(1, into, *kernel), noise(out, 1, *(1 for _ in kernel))
        stem = f"lora_unet_{path.replace('.', '_')}"
        held |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
        expected |= edited(pipe, "unet", path, up.flatten(1) @ down.flatten(1))
    save_file(held, tmp_path / "spm.safetensors")
    check(import_file(tmp_path / "spm.safetensors", pipe, CAT), pipe, expected, tmp_path)


def test_kohya_for_sdxl_in_the_published_layout(pipes: Any, noise: Any, tmp_path: Path) -> None:
    pipe = pipes["stable-diffusion-xl"]
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = factors(pipe, "unet", path, noise)
    stem = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k"
    clip = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    other = factors(pipe, "text_encoder_2", "encoder.layers.0.mlp.fc1", noise)
    held = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    held |= {f"{clip}.lora_down.weight": other[0], f"{clip}.lora_up.weight": other[1]}
    save_file(held, tmp_path / "lora.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    read = import_file(tmp_path / "lora.safetensors", pipe, CAT)
    assert read.notes == ("the file names no alpha: its scale is taken to be 1, as programs do",)
    expected = edited(pipe, "unet", path, up @ down)
    expected |= edited(pipe, "text_encoder_2", "encoder.layers.0.mlp.fc1", other[1] @ other[0])
    check(read, pipe, expected, tmp_path)


@pytest.mark.parametrize("family", FAMILIES[2:])
def test_erase_anything(pipes: Any, family: str, tmp_path: Path) -> None:
    """A LoRA as diffusers saves it, of another alpha than rank: read as the stock pipeline applies it."""
    pipe = pipes[family]
    made = copy.deepcopy(pipe)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["add_k_proj", "add_q_proj"])
    made.transformer.add_adapter(config)
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(made.transformer))
    told = made.transformer.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=told)
    read = import_file(tmp_path / "pytorch_lora_weights.safetensors", pipe, CAT)
    expected = {}
    for name, tensor in layers.items():
        if name.endswith("lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            expected |= edited(pipe, "transformer", path, 3 * layers[f"{path}.lora_B.weight"] @ tensor)
    assert len(expected) == 2 * len(pipe.transformer.transformer_blocks)
    check(read, pipe, expected, tmp_path)


@pytest.mark.parametrize(
    ("stem", "ends"),
    [
        (f"unet.{ATTENTION}.attn2.processor.to_k", ("_lora.down.weight", "_lora.up.weight")),
        (f"base_model.model.{KEY}", (".lora_A.weight", ".lora_B.weight")),
        (f"unet.base_model.model.{KEY}", (".lora_A.default.weight", ".lora_B.default.weight")),
        (f"lycoris_{KEY.replace('.', '_')}", (".lora_down.weight", ".lora_up.weight")),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k", (".lora_A.weight", ".lora_B.weight")),
    ],
)
def test_further_names(pipes: Any, noise: Any, stem: str, ends: tuple[str, str], tmp_path: Path) -> None:
    pipe = pipes["stable-diffusion"]
    down, up = factors(pipe, "unet", KEY, noise)
    save_file({f"{stem}{ends[0]}": down, f"{stem}{ends[1]}": up}, tmp_path / "lora.safetensors")
    check(import_file(tmp_path / "lora.safetensors", pipe, CAT), pipe, edited(pipe, "unet", KEY, up @ down), tmp_path)


@pytest.mark.parametrize(
    ("family", "stem"),
    [
        ("flux", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("stable-diffusion-3", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
    ],
)
def test_a_trained_lora_of_kohya_whose_fused_layers_share_their_input(
    pipes: Any, noise: Any, family: str, stem: str, tmp_path: Path
) -> None:
    """One pair of factors for queries, keys and values: each gets its rows of it."""
    pipe = pipes[family]
    out, into = weight(pipe, "transformer", "transformer_blocks.0.attn.to_q.weight").shape
    down, up = noise(4, into), noise(3 * out, 4)
    held = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    save_file(held, tmp_path / "lora.safetensors")
    expected = {}
    for place, part in enumerate(("to_q", "to_k", "to_v")):
        delta = 0.5 * up[place * out : (place + 1) * out] @ down
        expected |= edited(pipe, "transformer", f"transformer_blocks.0.attn.{part}", delta)
    check(import_file(tmp_path / "lora.safetensors", pipe, CAT), pipe, expected, tmp_path)


def test_an_imported_erasure_takes_no_additions_of_a_method_that_it_is_not_of(
    pipes: Any, noise: Any, tmp_path: Path
) -> None:
    """Nothing of it is fitted anew: what is added trains on top, or solves for the new concept and is summed."""
    pipe = copy.deepcopy(pipes["stable-diffusion"])
    stock = weight(pipe, "unet", f"{KEY}.weight")
    save_file({f"{KEY}.weight": stock + noise(*stock.shape)}, tmp_path / "esd.safetensors")
    read = import_file(tmp_path / "esd.safetensors", pipe, CAT).erasure
    both = erase(pipe, "dog", "uce", add_to=read, vocabulary=8, attach=False, progress=False)
    assert [concept.target for concept in both.concepts] == ["cat", "dog"]
    assert json.dumps(both.config.requests[0]["options"]["form"]) == '"weights"'
