"""Names of layers in LoRA files against the rules by which programs look for them, on models of full size.

The rules were written down from what the programs do: `comfy/lora.py` and `comfy/utils.py` of ComfyUI, `networks.py`
of AUTOMATIC1111, `networks/lora*.py` of sd-scripts. The layouts that models were published in are generated here anew,
without the tables of the package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from erasure.backbones import family_named
from erasure.exchange.loaders import LOADERS, Model

XL: dict[str, Any] = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD3: dict[str, Any] = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pooled_projection_dim": 2048,
}  # fmt: skip
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}


def flat(path: str) -> str:
    return path.replace(".", "_")


def layers(module: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d)
    return [name.removeprefix("text_model.") for name, each in module.named_modules() if isinstance(each, kinds)]


@cache
def networks(family: str) -> dict[str, nn.Module]:
    """The networks of a model of full size, without values."""
    with torch.device("meta"):
        small, large = CLIPTextModel(CLIPTextConfig()), CLIPTextConfig(**CLIP_G)
        if family == "stable-diffusion":
            return {"unet": UNet2DConditionModel(cross_attention_dim=768), "text_encoder": small}
        if family == "stable-diffusion-xl":
            second = CLIPTextModelWithProjection(large)
            return {"unet": UNet2DConditionModel(**XL), "text_encoder": small, "text_encoder_2": second}
        t5 = T5EncoderModel(T5Config(**T5))
        if family == "flux":
            whole = FluxTransformer2DModel(guidance_embeds=True)
            return {"transformer": whole, "text_encoder": small, "text_encoder_2": t5}
        clips = [CLIPTextModelWithProjection(CLIPTextConfig()), CLIPTextModelWithProjection(large)]
        return {
            "transformer": SD3Transformer2DModel(**SD3), "text_encoder": clips[0], "text_encoder_2": clips[1],
            "text_encoder_3": t5,
        }  # fmt: skip


# What was published --------------------------------------------------------------------------------------------------

ATTENTION = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
BLOCK = [*ATTENTION, "ff.net.0.proj", "ff.net.2"]
RESNET = ["in_layers.2", "emb_layers.1", "out_layers.3"]


def published_unet(depths: Iterable[int], middle: int, labels: bool) -> set[str]:
    """Layers of latent diffusion's UNet: two resnets a level, and the transformer blocks that its depth says."""
    depths = list(depths)
    found = {"input_blocks.0.0", "time_embed.0", "time_embed.2", "out.2"}
    found |= {"label_emb.0.0", "label_emb.0.2"} if labels else set()

    def put(block: str, depth: int) -> None:
        found.update(f"{block}.0.{part}" for part in (*RESNET, "skip_connection"))
        if depth:
            found.update(f"{block}.1.{part}" for part in ("proj_in", "proj_out"))
            found.update(f"{block}.1.transformer_blocks.{n}.{part}" for n in range(depth) for part in BLOCK)

    at = 0
    for level, depth in enumerate(depths):
        for _ in range(2):
            at += 1
            put(f"input_blocks.{at}", depth)
        if level < len(depths) - 1:
            at += 1
            found.add(f"input_blocks.{at}.0.op")
    found.update(f"middle_block.{place}.{part}" for place in (0, 2) for part in RESNET)
    found.update(f"middle_block.1.{part}" for part in ("proj_in", "proj_out"))
    found.update(f"middle_block.1.transformer_blocks.{n}.{part}" for n in range(middle) for part in BLOCK)
    at = -1
    for level, depth in reversed(list(enumerate(depths))):
        for _ in range(3):
            at += 1
            put(f"output_blocks.{at}", depth)
        if level:
            found.add(f"output_blocks.{at}.{2 if depth else 1}.conv")
    return found


def published_flux() -> set[str]:
    found = {"img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    found |= {f"{part}.{end}" for part in ("time_in", "vector_in", "guidance_in") for end in ("in_layer", "out_layer")}
    double = [
        f"{half}_{part}" for half in ("img", "txt") for part in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ]
    found |= {f"double_blocks.{n}.{part}" for n in range(19) for part in double}
    return found | {
        f"single_blocks.{n}.{part}" for n in range(38) for part in ("linear1", "linear2", "modulation.lin")
    }


def published_sd3() -> set[str]:
    found = {"x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    found |= {f"{part}.mlp.{n}" for part in ("t_embedder", "y_embedder") for n in (0, 2)}
    for n in range(24):
        for half in ("x_block", "context_block"):
            parts = ["attn.qkv", "adaLN_modulation.1"]
            if half == "x_block" or n < 23:
                parts += ["attn.proj", "mlp.fc1", "mlp.fc2"]
            if half == "x_block" and n < 13:
                parts += ["attn2.qkv", "attn2.proj"]
            found |= {f"joint_blocks.{n}.{half}.{part}" for part in parts}
    return found


PUBLISHED: dict[str, Callable[[], set[str]]] = {
    "stable-diffusion": lambda: published_unet((1, 1, 1, 0), 1, False),
    "stable-diffusion-xl": lambda: published_unet((0, 2, 10), 10, True),
    "flux": published_flux,
    "stable-diffusion-3": published_sd3,
}
CLIPS = {"stable-diffusion": 1, "stable-diffusion-xl": 2, "flux": 1, "stable-diffusion-3": 2}
DEPTHS = (12, 32)
CLIP_PARTS = [*(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]


def clip_names(prefix: str, depth: int) -> set[str]:
    return {f"{prefix}_text_model_encoder_layers_{n}_{part}" for n in range(depth) for part in CLIP_PARTS}


# What programs look for ----------------------------------------------------------------------------------------------


def comfyui(family: str, parts: dict[str, nn.Module]) -> Callable[[str], bool]:
    """Every published layer; those of UNets by diffusers' paths too; CLIP by number; T5 as the third."""
    known = {f"lora_unet_{flat(name)}" for name in PUBLISHED[family]()}
    if "unet" in parts:
        inside = [path for path in layers(parts["unet"]) if not path.startswith("add_embedding")]
        known |= {f"lora_unet_{flat(path)}" for path in inside}
    known |= clip_names("lora_te", 12) | clip_names("lora_te1", 12)
    if CLIPS[family] == 2:
        known |= clip_names("lora_te2", 32)
    for part in parts.values():
        if isinstance(part, T5EncoderModel):
            known |= {f"lora_te3_{flat(path)}" for path in layers(part)}
    return known.__contains__


def kohya(family: str, parts: dict[str, nn.Module]) -> Callable[[str], bool]:
    """sd-scripts has diffusers' UNet for Stable Diffusion, and the published networks for the others."""
    denoiser = layers(parts["unet"]) if family == "stable-diffusion" else PUBLISHED[family]()
    known = {f"lora_unet_{flat(name)}" for name in denoiser}
    numbers = [""] if family == "stable-diffusion" else ["1", "2"][: CLIPS[family]]
    for number, depth in zip(numbers, DEPTHS, strict=False):
        known |= clip_names(f"lora_te{number}", depth)
    for part in parts.values():
        if isinstance(part, T5EncoderModel):
            known |= {f"lora_te3_{flat(path)}" for path in layers(part)}
    return known.__contains__


RENAMED = {
    "resnets": {"conv1": "in_layers_2", "conv2": "out_layers_3", "norm1": "in_layers_0", "norm2": "out_layers_0",
                "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"},
    "attentions": {},
}  # fmt: skip


def a1111(family: str, parts: dict[str, nn.Module]) -> Callable[[str], bool]:
    """AUTOMATIC1111 turns names into those of the networks of latent diffusion and looks for them there."""
    xl = family == "stable-diffusion-xl"
    there = {f"diffusion_model_{flat(name)}" for name in PUBLISHED[family]()}
    there |= {name.replace("lora_te", "0_transformer" if xl else "transformer") for name in clip_names("lora_te", 12)}
    resblocks = {f"attn_{part}_proj" for part in ("q", "k", "v", "out")} | {"mlp_c_fc", "mlp_c_proj"}
    there |= {f"1_model_transformer_resblocks_{n}_{part}" for n in range(32) for part in resblocks} if xl else set()

    def turned(name: str) -> str:
        if match := re.match(r"lora_unet_(conv_in|conv_out)$", name):
            return {"conv_in": "diffusion_model_input_blocks_0_0", "conv_out": "diffusion_model_out_2"}[match[1]]
        if match := re.match(r"lora_unet_time_embedding_linear_(\d+)$", name):
            return f"diffusion_model_time_embed_{int(match[1]) * 2 - 2}"
        if match := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
            way, block, kind, inner, rest = match.groups()
            number = int(block) * 3 + int(inner) + (way == "down")
            where = "input" if way == "down" else "output"
            rest = RENAMED[kind].get(rest, rest)
            return f"diffusion_model_{where}_blocks_{number}_{int(kind == 'attentions')}_{rest}"
        if match := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
            kind, inner, rest = match.groups()
            number = 1 if kind == "attentions" else int(inner) * 2
            return f"diffusion_model_middle_block_{number}_{RENAMED[kind].get(rest, rest)}"
        if match := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
            return f"diffusion_model_input_blocks_{3 + int(match[1]) * 3}_0_op"
        if match := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
            return f"diffusion_model_output_blocks_{2 + int(match[1]) * 3}_{2 if int(match[1]) > 0 else 1}_conv"
        if match := re.match(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", name):
            return f"transformer_text_model_encoder_layers_{match[1]}_{match[2]}"
        if match := re.match(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", name):
            rest = (
                match[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
            )
            return f"1_model_transformer_resblocks_{match[1]}_{rest}"
        return name

    def known(name: str) -> bool:
        if turned(name) in there:
            return True
        if "lora_unet" in name:
            return name.replace("lora_unet", "diffusion_model") in there
        return name.replace("lora_te1_text_model", "0_transformer_text_model") in there

    return known


RULES = {"comfyui": comfyui, "kohya": kohya, "a1111": a1111}
CASES = [(family, to) for family in PUBLISHED for to in RULES if family not in LOADERS[to].refused]


@pytest.mark.parametrize(("family", "to"), CASES)
def test_programs_know_every_name(family: str, to: str) -> None:
    parts = networks(family)
    known, loader, kind = RULES[to](family, parts), LOADERS[to], family_named(family)
    assert kind is not None
    denoiser: Any = parts[kind.denoiser_component]
    model = Model(family, kind.published_layout(denoiser))
    keys = [f"{component}/{path}" for component, part in parts.items() for path in layers(part)]
    skipped, stems = [], set()
    for key in keys:
        named = loader.names(model, key)
        if isinstance(named, str):
            skipped.append(key)
            continue
        assert known(named.stem), (key, named.stem)
        place = named.place
        stems.add((named.stem, 0 if place is None else place.part))
    # One name for each layer, or one place in a tensor that holds several.
    assert len(stems) == len(keys) - len(skipped)
    assert all(key.endswith("text_projection") for key in skipped), skipped


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_layout_is_known_by_the_names_in_a_file(family: str) -> None:
    """Programs that have loaded a published file have no network of diffusers to ask."""
    kind = family_named(family)
    assert kind is not None
    denoiser: Any = networks(family)[kind.denoiser_component]
    found = kind.layout_of({f"{name}.weight" for name in PUBLISHED[family]()})
    wanted = kind.published_layout(denoiser)
    assert found is not None
    assert wanted is not None
    for path in dict(denoiser.named_parameters()):
        assert found(path) == wanted(path), path


@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-xl", "chroma"])
def test_names_of_another_kind_give_no_layout(family: str) -> None:
    kind = family_named(family)
    assert kind is not None
    assert kind.layout_of({f"{name}.weight" for name in published_flux()}) is None


@pytest.mark.parametrize("to", RULES)
def test_all_32_doors_of_stable_diffusion_are_known(to: str) -> None:
    """Under diffusers' names ComfyUI and AUTOMATIC1111 know none of them."""
    parts = networks("stable-diffusion")
    known = RULES[to]("stable-diffusion", parts)
    doors = [f"unet/{path}" for path in layers(parts["unet"]) if re.search(r"attn2\.to_[kv]$", path)]
    assert len(doors) == 32
    names = [LOADERS[to].names(Model("stable-diffusion"), key) for key in doors]
    assert sum(known(named.stem) for named in names if not isinstance(named, str)) == 32
    assert not any(known(f"unet.{key.removeprefix('unet/')}") for key in doors)


def test_layers_whose_name_depends_on_the_model_ask_for_it() -> None:
    for family, to in (("stable-diffusion-xl", "kohya"),):
        told = LOADERS[to].names(Model(family), "unet/down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
        assert isinstance(told, str)
        assert "--model" in told
