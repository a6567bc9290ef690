"""The image tower of `canvas-clip` as transformers has it, and what it says of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from erasure.assets import path as embedded
from erasure.assets.scenes import Scene, render


def image_tower() -> CLIPVisionModelWithProjection:
    """The image tower of `canvas-clip`, for pictures as CLIP's own processor normalises them.

    canvas-clip takes pixels in [-1, 1], and diffusers makes a processor with the means and deviations of CLIP. The
    difference goes into the weights of the patches and the positions, so what the tower says stays the same.
    """
    described = json.loads((embedded("canvas-clip") / "open_clip_config.json").read_text())["model_cfg"]
    vision = described["vision_cfg"]
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=vision["image_size"], patch_size=vision["patch_size"], hidden_size=vision["width"],
            num_hidden_layers=vision["layers"], intermediate_size=4 * vision["width"], hidden_act="gelu",
            num_attention_heads=vision["width"] // vision["head_width"], projection_dim=described["embed_dim"],
        )
    )  # fmt: skip
    tower.load_state_dict(vision_states(load_file(embedded("canvas-clip") / "open_clip_model.safetensors")))
    processor = CLIPImageProcessor()
    mean, deviation = (torch.tensor(values) for values in (processor.image_mean, processor.image_std))
    embeddings = tower.vision_model.embeddings
    with torch.no_grad():
        weight = embeddings.patch_embedding.weight
        shift = torch.einsum("ocxy,c->o", weight, (mean - 0.5) / 0.5)
        embeddings.position_embedding.weight[1:] += shift
        weight *= (deviation / 0.5)[None, :, None, None]
    return tower.eval().requires_grad_(False)


def vision_states(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's state dict in transformers' names, from one in open_clip's."""
    made = {
        "vision_model.embeddings.class_embedding": given["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": given["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": given["visual.conv1.weight"],
        "visual_projection.weight": given["visual.proj"].T,
    }
    for ours, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        made |= {f"vision_model.{ours}.{part}": given[f"visual.{theirs}.{part}"] for part in ("weight", "bias")}
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    layer = 0
    while f"visual.transformer.resblocks.{layer}.ln_1.weight" in given:
        ours, theirs = f"vision_model.encoder.layers.{layer}", f"visual.transformer.resblocks.{layer}"
        for part in ("weight", "bias"):
            made |= {f"{ours}.{a}.{part}": given[f"{theirs}.{b}.{part}"] for a, b in parts.items()}
            joined = given[f"{theirs}.attn.in_proj_{part}"].chunk(3)
            made |= {f"{ours}.self_attn.{p}_proj.{part}": piece for p, piece in zip("qkv", joined, strict=True)}
        layer += 1
    return {name: tensor.float() for name, tensor in made.items()}


@torch.no_grad()
def embeddings(tower: CLIPVisionModelWithProjection, images: list[Image.Image], batch: int = 50) -> Tensor:
    """Embed pictures with an image tower, `(pictures, width)`."""
    side = tower.config.image_size
    processor = CLIPImageProcessor(size=side, crop_size=side)
    found = []
    for first in range(0, len(images), batch):
        pixels = processor(images[first : first + batch], return_tensors="pt").pixel_values
        found.append(tower(pixels).image_embeds)
    return torch.cat(found)


def drawn(scenes: list[Scene]) -> Iterator[Image.Image]:
    """Draw pictures of scenes, one after the other."""
    for scene in scenes:
        yield Image.fromarray(render(scene).image)


def seen(tower: CLIPVisionModelWithProjection, scenes: list[Scene], path: Path) -> Tensor:
    """Embed scenes with an image tower, `(scenes, width)`, unless their embeddings are in `path` already."""
    if not path.exists():
        torch.save(embeddings(tower, list(drawn(scenes))), path)
    found: Tensor = torch.load(path, weights_only=True)
    return found
