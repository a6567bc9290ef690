"""Names in LoRA files: what we write is what diffusers, ComfyUI and A1111 look for, and it is read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.lora_names import file_names, layer_of
from erasure.errors import ArtifactError

XL: dict[str, Any] = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
}  # fmt: skip
UNETS = {"SD 1.5": {"cross_attention_dim": 768}, "SDXL": XL}


def layers(component: str, module: nn.Module) -> list[str]:
    """Every layer that may have low-rank factors, in canonical paths."""
    return [
        f"{component}/{name.removeprefix('text_model.')}"
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and "text_projection" not in name
    ]


@pytest.fixture(params=UNETS)
def unet(request: pytest.FixtureRequest) -> list[str]:
    with torch.device("meta"):
        return layers("unet", UNet2DConditionModel(**UNETS[request.param]))


@pytest.fixture
def text() -> list[str]:
    with torch.device("meta"):
        return layers("text_encoder", CLIPTextModel(CLIPTextConfig()))


def test_every_layer_is_found_again(unet: list[str], text: list[str]) -> None:
    for keys in (unet, text, unet + text):
        names = file_names(keys)
        assert len({name for pair in names.values() for name in pair}) == 2 * len(keys)
        for key, (down, up) in names.items():
            assert layer_of(down.removesuffix(".lora_down.weight")) == key
            assert layer_of(up.removesuffix(".lora_up.weight")) == key


def test_other_programs_know_the_names(unet: list[str], text: list[str]) -> None:
    """ComfyUI (`model_lora_keys_unet` and `model_lora_keys_clip`) and A1111 (`networks.py`) look for these."""
    for key, (down, _) in file_names(unet + text).items():
        path = key.partition("/")[2].replace(".", "_")
        known = f"lora_unet_{path}" if key.startswith("unet/") else f"lora_te_text_model_{path}"
        assert down.partition(".")[0] == known


def test_diffusers_reads_the_names(unet: list[str], text: list[str]) -> None:
    for key, (down, up) in file_names(unet).items():
        state = {down: torch.ones(1, 1), up: torch.ones(1, 1)}
        found, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(state)
        plain = convert_unet_state_dict_to_peft({name.removeprefix("unet."): t for name, t in found.items()})
        path = key.removeprefix("unet/")
        assert set(plain) == {f"{path}.lora_A.weight", f"{path}.lora_B.weight"}


def test_two_text_encoders_have_numbers() -> None:
    with torch.device("meta"):
        second = layers("text_encoder_2", CLIPTextModelWithProjection(CLIPTextConfig()))
    names = file_names(["text_encoder/encoder.layers.0.mlp.fc1", *second])
    assert (
        names["text_encoder/encoder.layers.0.mlp.fc1"][0]
        == "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    )
    assert names["text_encoder_2/encoder.layers.0.mlp.fc1"][0].startswith("lora_te2_text_model_encoder_layers_0")
    for key, (down, _) in names.items():
        assert layer_of(down.removesuffix(".lora_down.weight")) == key


@pytest.mark.parametrize(
    "other", ["transformer/blocks.0.attn.to_k", "unet/strange.to_k", "unet/a_.to_k", "unet/to_k_"]
)
def test_one_layer_that_kohya_has_no_name_for_gives_all_diffusers_names(other: str) -> None:
    names = file_names(["unet/mid_block.attentions.0.proj_in", "text_encoder/encoder.layers.0.mlp.fc1", other])
    assert names["unet/mid_block.attentions.0.proj_in"][0] == "unet.mid_block.attentions.0.proj_in.lora_A.weight"
    assert names["text_encoder/encoder.layers.0.mlp.fc1"][1].startswith("text_encoder.text_model.encoder")
    for key, (down, _) in names.items():
        assert layer_of(down.removesuffix(".lora_A.weight")) == key


@pytest.mark.parametrize("stem", ["", "unet", "lora_unet_", "lora_unet_nothing", "lora_unet_to_k_", "lora_te_encoder"])
def test_names_that_are_none(stem: str) -> None:
    assert layer_of(stem) is None


def test_both_kinds_of_names_are_read() -> None:
    edit = LowRank(torch.ones(2, 3), torch.ones(4, 2))
    key = "unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    ours = Edits(low_rank={key: edit}).lora_state_dict()
    assert set(ours) == {f"lora_unet_{key[5:].replace('.', '_')}.lora_{end}.weight" for end in ("down", "up")}
    earlier = {f"{key.replace('/', '.')}.lora_A.weight": edit[0], f"{key.replace('/', '.')}.lora_B.weight": edit[1]}
    for state in (ours, earlier):
        read = Edits.from_state_dicts({}, state).low_rank[key]
        assert all(torch.equal(a, b) for a, b in zip(read, edit, strict=True))


def test_the_pooled_door_of_sdxl_has_the_name_that_every_loader_knows() -> None:
    """As the layer was called first: `label_emb.0.0`. Names made of diffusers' own are read by none."""
    key = "unet/add_embedding.linear_1"
    down, up = file_names([key, "unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_k"])[key]
    assert (down, up) == ("lora_unet_label_emb_0_0.lora_down.weight", "lora_unet_label_emb_0_0.lora_up.weight")
    assert layer_of("lora_unet_label_emb_0_0") == key
    state = {down: torch.ones(1, 1), up: torch.ones(1, 1)}
    found, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(state)
    plain = convert_unet_state_dict_to_peft({name.removeprefix("unet."): part for name, part in found.items()})
    assert set(plain) == {f"add_embedding.linear_1.lora_{part}.weight" for part in "AB"}


def test_low_rank_edits_of_t5_are_in_no_lora_file() -> None:
    """Stock pipelines load no LoRA into T5 and say nothing, so none is offered to them."""
    t5 = "text_encoder_2/encoder.block.0.layer.0.SelfAttention.o"
    clip = "text_encoder/encoder.layers.0.self_attn.out_proj"
    edits = Edits({key: LowRank(torch.ones(2, 3), torch.ones(4, 2)) for key in (t5, clip)})
    assert {layer_of(name.rpartition(".lora_")[0]) for name in edits.lora_state_dict()} == {clip}
    assert set(edits.delta_state_dict()) == {f"{t5}/low_rank.down", f"{t5}/low_rank.up"}
    again = Edits.from_state_dicts(edits.delta_state_dict(), edits.lora_state_dict())
    assert again.equals(edits)
    assert set(again.low_rank) == {t5, clip}
    with pytest.raises(ArtifactError, match="does not fit together"):
        Edits.from_state_dicts(
            {f"{clip}/low_rank.down": torch.ones(2, 3), f"{clip}/low_rank.up": torch.ones(4, 2)}, {}
        )
    with pytest.raises(ArtifactError, match="does not fit together"):
        Edits.from_state_dicts({f"{t5}/low_rank.down": torch.ones(2, 3), f"{t5}/low_rank.up": torch.ones(4, 3)}, {})
    with pytest.raises(ArtifactError, match="incomplete"):
        Edits.from_state_dicts({f"{t5}/low_rank.down": torch.ones(2, 3)}, {})


def test_models_with_a_transformer_have_diffusers_names() -> None:
    """Their loaders read no names of kohya's for text encoders."""
    key = "text_encoder/encoder.layers.0.mlp.fc1"
    assert file_names([key], kohya=False)[key][0] == "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
