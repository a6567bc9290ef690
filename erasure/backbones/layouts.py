"""Names of the tensors of diffusers' networks in files of the layouts that the models were published in.

ComfyUI, AUTOMATIC1111, Forge and kohya's scripts go by these names. A layout gives for each parameter of a network of
diffusers its place in such a file: a name, the part that it is of a tensor that holds several stacked by rows, and the
form that it has there. So the same table writes checkpoints, gives the layers of a LoRA their names, and reads both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["same", "swapped", "convolution", "transposed"]
"""Form in which a tensor is written: as it is, with the halves of its rows exchanged, as a convolution of 1x1, or
transposed."""


class Place(NamedTuple):
    """Place of one of diffusers' parameters in a published file."""

    key: str
    """Name of the tensor in the file."""
    part: int = 0
    """Number of the parameter, from 0 on, among those that one tensor of the file holds stacked by rows."""
    parts: int = 1
    """Number of parameters that the tensor holds."""
    form: Form = "same"


Layout = Callable[[str], Place | None]
"""The place of a parameter by its canonical path; `None` for a parameter that the layout does not have."""
Rule = tuple[str, str]
"""Pattern of a module's path, and the name in its stead."""
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip
"""Layers of a UNet beside its blocks."""
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet_layout(paths: Iterable[str], per_block: int) -> Layout:
    """Latent diffusion's layout of a UNet of Stable Diffusion.

    Args:
        paths: Its parameters.
        per_block: Its `layers_per_block`.
    """
    attended = {match[1] for path in paths if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", path))}

    def place(path: str) -> Place | None:
        module, _, parameter = path.rpartition(".")
        if module in OUTSIDE:
            return Place(f"{OUTSIDE[module]}.{parameter}")
        if match := MIDDLE.fullmatch(path):
            kind, number, rest = match.groups()
            if kind == "resnets":
                return Place(f"middle_block.{2 * int(number)}.{_resnet(rest)}")
            return Place(f"middle_block.{2 * int(number) + 1}.{rest}")
        if (match := BLOCK.fullmatch(path)) is None:
            return None
        way, block, kind, number, rest = match.groups()
        first = int(block) * (per_block + 1)
        if kind == "downsamplers":
            return Place(f"input_blocks.{first + per_block + 1}.0.{rest.replace('conv', 'op', 1)}")
        if kind == "upsamplers":
            return Place(f"output_blocks.{first + per_block}.{2 if block in attended else 1}.{rest}")
        where = f"input_blocks.{1 + first + int(number)}" if way == "down" else f"output_blocks.{first + int(number)}"
        return Place(f"{where}.0.{_resnet(rest)}" if kind == "resnets" else f"{where}.1.{rest}")

    return place


def unet_layout_of(names: Collection[str]) -> Layout | None:
    """Latent diffusion's layout of a UNet of which a published file is there, and no network of diffusers.

    Args:
        names: Names of the denoiser's tensors in the file.

    Returns:
        The layout; `None` where the names are not those of such a UNet.
    """
    blocks = _numbers(r"input_blocks\.(\d+)\.", names)
    if not blocks:
        return None
    per_block = min(_numbers(r"input_blocks\.(\d+)\.0\.op\.", names), default=max(blocks) + 1) - 1
    attended = {number // (per_block + 1) for number in _numbers(r"output_blocks\.(\d+)\.1\.proj_in\.", names)}
    return unet_layout([f"up_blocks.{number}.attentions.0.proj_in" for number in attended], per_block)


def _numbers(pattern: str, names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _resnet(rest: str) -> str:
    layer, _, parameter = rest.rpartition(".")
    return f"{RESNET.get(layer, layer)}.{parameter}"


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
"""Layers of the attention in the middle of an autoencoder."""


def vae_layout(up_blocks: int) -> Layout:
    """Latent diffusion's layout of an autoencoder.

    Args:
        up_blocks: How many blocks its decoder has, which it counts from the other end.
    """

    def place(path: str) -> Place | None:
        if path.startswith(("quant_conv.", "post_quant_conv.")):
            return Place(path)
        half, _, rest = path.partition(".")
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", rest):
            way, block, kind, number, inner = match.groups()
            at = f"{half}.{way}.{block if way == 'down' else up_blocks - 1 - int(block)}"
            inner = inner.replace("conv_shortcut", "nin_shortcut")
            return Place(f"{at}.block.{number}.{inner}" if kind == "resnets" else f"{at}.{kind[:-2]}.{inner}")
        if match := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", rest):
            return Place(f"{half}.mid.block_{int(match[1]) + 1}.{match[2].replace('conv_shortcut', 'nin_shortcut')}")
        if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest):
            if match[1] not in VAE_ATTENTION:
                return None
            is_matrix = match[1] != "group_norm" and match[2] == "weight"
            name = f"{half}.mid.attn_1.{VAE_ATTENTION[match[1]]}.{match[2]}"
            return Place(name, form="convolution" if is_matrix else "same")
        rest = rest.replace("conv_norm_out", "norm_out")
        return Place(f"{half}.{rest}") if rest.rpartition(".")[0] in ("conv_in", "norm_out", "conv_out") else None

    return place


def clip_layout(path: str) -> Place | None:
    """The layout of OpenAI's CLIP as transformers had it first, which is that of the canonical paths."""
    return Place(f"text_model.{path}")


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def open_clip_layout(path: str) -> Place | None:
    """The layout of OpenCLIP: queries, keys and values stand in one tensor."""
    if path == "text_projection.weight":
        return Place("text_projection", form="transposed")
    if path in OPEN_CLIP:
        return Place(OPEN_CLIP[path])
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", path)
    if match is None:
        return None
    at, layer, parameter = f"transformer.resblocks.{match[1]}", match[2], match[3]
    if layer in (projections := [f"self_attn.{letter}_proj" for letter in "qkv"]):
        return Place(f"{at}.attn.in_proj_{parameter}", projections.index(layer), 3)
    return Place(f"{at}.{OPEN_CLIP_BLOCK[layer]}.{parameter}") if layer in OPEN_CLIP_BLOCK else None


EMBEDDERS = "time_text_embed"
FLUX: tuple[Rule, ...] = (
    (rf"{EMBEDDERS}\.timestep_embedder\.linear_(\d)", "time_in.{ends}"),
    (rf"{EMBEDDERS}\.text_embedder\.linear_(\d)", "vector_in.{ends}"),
    (rf"{EMBEDDERS}\.guidance_embedder\.linear_(\d)", "guidance_in.{ends}"),
    (r"context_embedder", "txt_in"),
    (r"x_embedder", "img_in"),
    (r"proj_out", "final_layer.linear"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", "double_blocks.{0}.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", "double_blocks.{0}.txt_mod.lin"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", "double_blocks.{0}.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", "double_blocks.{0}.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", "double_blocks.{0}.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", "double_blocks.{0}.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", "double_blocks.{0}.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", "double_blocks.{0}.txt_mlp.2"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", "single_blocks.{0}.modulation.lin"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", "single_blocks.{0}.linear2"),
)
FLUX_NORMS: tuple[Rule, ...] = (
    (r"transformer_blocks\.(\d+)\.attn\.norm_q", "double_blocks.{0}.img_attn.norm.query_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_k", "double_blocks.{0}.img_attn.norm.key_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_q", "double_blocks.{0}.txt_attn.norm.query_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_k", "double_blocks.{0}.txt_attn.norm.key_norm"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_q", "single_blocks.{0}.norm.query_norm"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_k", "single_blocks.{0}.norm.key_norm"),
)
"""Norms, whose parameter is called `scale` in the original layout."""
STACKED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"transformer_blocks\.(\d+)\.attn\.", "double_blocks.{0}.img_attn.qkv", ("to_q", "to_k", "to_v")),
    (
        r"transformer_blocks\.(\d+)\.attn\.", "double_blocks.{0}.txt_attn.qkv",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
    ),
    (
        r"single_transformer_blocks\.(\d+)\.", "single_blocks.{0}.linear1",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ),
)  # fmt: skip
"""Layers of Flux that stand in one tensor: pattern ahead of them, its name, and their names."""


def flux_layout(path: str) -> Place | None:
    """Black Forest Labs' layout of FLUX.1's transformer."""
    module, _, parameter = path.rpartition(".")
    if module == "norm_out.linear":
        return Place(f"final_layer.adaLN_modulation.1.{parameter}", form="swapped")
    if name := _renamed(module, FLUX_NORMS):
        return Place(f"{name}.scale")
    if name := _renamed(module, FLUX):
        return Place(f"{name}.{parameter}")
    return _stacked(module, parameter, STACKED)


SD3: tuple[Rule, ...] = (
    (rf"{EMBEDDERS}\.timestep_embedder\.linear_(\d)", "t_embedder.mlp.{evens}"),
    (rf"{EMBEDDERS}\.text_embedder\.linear_(\d)", "y_embedder.mlp.{evens}"),
    (r"context_embedder", "context_embedder"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"proj_out", "final_layer.linear"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", "joint_blocks.{0}.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", "joint_blocks.{0}.context_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", "joint_blocks.{0}.x_block.{1}.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", "joint_blocks.{0}.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.norm_(q|k)", "joint_blocks.{0}.x_block.{1}.ln_{2}"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)", "joint_blocks.{0}.context_block.attn.ln_{1}"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", "joint_blocks.{0}.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", "joint_blocks.{0}.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", "joint_blocks.{0}.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", "joint_blocks.{0}.context_block.mlp.fc2"),
)
SD3_STACKED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"transformer_blocks\.(\d+)\.(attn2?)\.", "joint_blocks.{0}.x_block.{1}.qkv", ("to_q", "to_k", "to_v")),
    (
        r"transformer_blocks\.(\d+)\.attn\.", "joint_blocks.{0}.context_block.attn.qkv",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
    ),
)  # fmt: skip


def sd3_layout(layers: int | None) -> Layout:
    """Stability AI's layout of Stable Diffusion 3's transformer.

    Args:
        layers: How many blocks it has: the last one's text modulation has its halves exchanged. `None` where that is
            unknown; that one layer has no place then.
    """

    def place(path: str) -> Place | None:
        module, _, parameter = path.rpartition(".")
        if path == "pos_embed.pos_embed":
            return Place("pos_embed")
        if module == "norm_out.linear":
            return Place(f"final_layer.adaLN_modulation.1.{parameter}", form="swapped")
        if found := _stacked(module, parameter, SD3_STACKED):
            return found
        if (name := _renamed(module, SD3)) is None:
            return None
        form: Form = "same"
        if module.endswith(".norm1_context.linear"):
            if layers is None:
                return None
            form = "swapped" if module == f"transformer_blocks.{layers - 1}.norm1_context.linear" else "same"
        return Place(f"{name}.{parameter}", form=form)

    return place


def sd3_layout_of(names: Collection[str]) -> Layout:
    """Stability AI's layout of a transformer of which a published file is there; see `unet_layout_of`."""
    blocks = _numbers(r"joint_blocks\.(\d+)\.", names)
    return sd3_layout(max(blocks) + 1 if blocks else None)


def _renamed(module: str, rules: Iterable[Rule]) -> str | None:
    for pattern, name in rules:
        if match := re.fullmatch(pattern, module):
            number = int(match[1]) if match.groups() and match[1].isdigit() else 0
            ends, evens = ("in_layer", "out_layer")[number == 2], 2 * (number - 1)
            return name.format(*match.groups(), ends=ends, evens=evens)
    return None


def _stacked(module: str, parameter: str, table: Iterable[tuple[str, str, tuple[str, ...]]]) -> Place | None:
    for ahead, name, parts in table:
        match = re.match(ahead, module)
        if match and module[match.end() :] in parts:
            return Place(f"{name.format(*match.groups())}.{parameter}", parts.index(module[match.end() :]), len(parts))
    return None


# Whole networks ------------------------------------------------------------------------------------------------------


def to_original(tensors: Mapping[str, Tensor], layout: Layout, prefix: str = "") -> dict[str, Tensor]:
    """Convert a network's tensors to the names and forms of a layout.

    Args:
        tensors: Every parameter by its canonical path.
        layout: The layout.
        prefix: What all names begin with.

    Raises:
        KeyError: The layout has no place for a parameter; its path is the argument.
    """
    found: dict[str, dict[int, Tensor]] = {}
    counts: dict[str, int] = {}
    for path, tensor in tensors.items():
        place = layout(path)
        if place is None:
            raise KeyError(path)
        held = found.setdefault(prefix + place.key, {})
        if place.part in held:
            raise KeyError(path)
        held[place.part], counts[prefix + place.key] = formed(tensor, place.form), place.parts
    for key, parts in found.items():
        if len(parts) != counts[key]:
            raise KeyError(f"{key}, part {next(part for part in range(counts[key]) if part not in parts)}")
    whole = {key: [parts[number] for number in sorted(parts)] for key, parts in found.items()}
    return {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in whole.items()}


def heights(place: Place, tensor: Tensor) -> list[int]:
    """Give the number of rows of each weight in a tensor of a file.

    Args:
        place: Place of one of them.
        tensor: The tensor of weights: queries, keys and values are of one size, and the rest stands behind them.
    """
    if place.parts < 4:
        return [len(tensor) // place.parts] * place.parts
    width = tensor.shape[1]
    return [width, width, width, len(tensor) - 3 * width]


def taken(place: Place, tensor: Tensor, rows: list[int]) -> Tensor:
    """Take a parameter, in diffusers' form, from the tensor of a file that contains it.

    Args:
        place: Its place.
        tensor: The tensor, of weights or of biases.
        rows: See `heights`.
    """
    return unformed(tensor, place.form) if place.parts == 1 else tensor.split(rows)[place.part]


def starts(rows: Mapping[str, int], layout: Layout) -> dict[str, int]:
    """Give the row at which each parameter begins in its tensor."""
    stacked: dict[str, list[tuple[int, str]]] = {}
    for path in rows:
        if (place := layout(path)) is not None:
            stacked.setdefault(place.key, []).append((place.part, path))
    found = {}
    for parts in stacked.values():
        at = 0
        for _, path in sorted(parts):
            found[path] = at
            at += rows[path]
    return found


def formed(tensor: Tensor, form: Form) -> Tensor:
    """Convert a tensor of diffusers to its form in a file."""
    if form == "swapped":
        return torch.cat(list(reversed(tensor.chunk(2))))
    if form == "convolution":
        return tensor[:, :, None, None]
    return tensor.T if form == "transposed" else tensor


def unformed(tensor: Tensor, form: Form) -> Tensor:
    """Convert a tensor of a file to its form in diffusers."""
    if form == "convolution":
        return tensor.flatten(1)
    return formed(tensor, form)
