"""Single-file checkpoints, as ComfyUI and A1111 read them: which pipeline of diffusers one holds, and its networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    fetch_diffusers_config,
    infer_diffusers_model_type,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from erasure.errors import OptionError, UnsupportedModelError
from erasure.files import shown
from erasure.files.tensors import tensor_infos

MissingPartError = SingleFileComponentError
"""A checkpoint lacks a part of the pipeline, and so does the folder of its configs."""
STOCK = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "inpainting_v2": "StableDiffusionInpaintPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "xl_inpaint": "StableDiffusionXLInpaintPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "chroma": "ChromaPipeline",
}
"""Classes of diffusers by the kinds that it tells checkpoints apart by."""
V1 = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
"""A tensor of every Stable Diffusion 1.x."""
XL_TEXT = "conditioner.embedders.1."
"""Beginning of the names of the second text encoder of every SDXL."""
AUTOENCODERS = ("first_stage_model.", "vae.")
"""Beginnings of the names of an autoencoder's tensors, where a file holds more than that."""
CLIPS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
T5 = "T5EncoderModel"
MOST_BYTES = 2**40
FLUX_WIDTH = 3072
"""Width of FLUX.1's transformer, the only one that diffusers' conversion splits rightly."""
FLUX_KINDS = ("flux-dev", "flux-schnell")
FLUX_INPUTS = ("double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight")
"""Names of a layer that reads the whole width."""


def stock_class(path: str | Path, told: str | None = None) -> str:
    """Name of the class of diffusers whose pipeline a checkpoint holds; only names and shapes of tensors are read.

    Args:
        path: The checkpoint.
        told: Class of the model whose configs the user has named. It counts where diffusers, which knows the kinds by
            their sizes, knows none: for a model of another size.

    Raises:
        UnsupportedModelError: A checkpoint of another kind.
        OptionError: The checkpoint is of one kind, and the named model of another.
        ArtifactError: The file is damaged.
    """
    infos = tensor_infos(path, limit_bytes=MOST_BYTES)
    try:
        kind = infer_diffusers_model_type(infos)
    except IndexError:  # a tensor by which kinds are told apart has another number of axes
        kind = "v1"
    width = next((infos[name].shape[-1] for name in FLUX_INPUTS if name in infos), FLUX_WIDTH)
    if kind in FLUX_KINDS and width != FLUX_WIDTH:
        raise UnsupportedModelError(
            f"{shown(str(path), 200)} is a FLUX.1 of width {width}, and diffusers reads single files of width "
            f"{FLUX_WIDTH} only, the published one: load the model from its folder"
        )
    unknown = kind == "v1" and (V1 not in infos or any(name.startswith(XL_TEXT) for name in infos))
    if unknown and told in STOCK.values():  # what diffusers does not know it calls v1
        return str(told)
    if kind not in STOCK or unknown:
        what = "no kind that is known" if kind == "v1" else f"the kind {kind!r}"
        raise UnsupportedModelError(
            f"{shown(str(path), 200)} is a single-file checkpoint of {what}; supported: {', '.join(STOCK)}. Load it "
            "with the class of its model and save_pretrained, if there is one; a model of another size than the "
            "published ones needs config=FOLDER (--config on the command line), a folder of its kind"
        )
    if told is not None and told != STOCK[kind]:
        raise OptionError(
            f"{shown(str(path), 200)} is a single-file checkpoint of a {STOCK[kind]}, and the configs that were named "
            f"are those of a {told}: name a model of its kind with config= (--config), or leave it out"
        )
    return STOCK[kind]


def published_as(path: str | Path) -> str:
    """Repository of the Hub from which diffusers takes the configs of a checkpoint."""
    return str(fetch_diffusers_config(tensor_infos(path, limit_bytes=MOST_BYTES))["pretrained_model_name_or_path"])


def missing_parts(path: str | Path, index: Mapping[str, object]) -> list[str]:
    """List the text encoders and autoencoders of a model that a checkpoint does not hold.

    diffusers asks for them as objects: of SD3 and FLUX.1 the transformer alone is often published.

    Args:
        path: The checkpoint.
        index: Content of the model's `model_index.json`: library and class by component.
    """
    names = tensor_infos(path, limit_bytes=MOST_BYTES)
    found = []
    for component, value in index.items():
        kind = str(value[1]) if isinstance(value, (list, tuple)) and len(value) == 2 else ""
        if kind in CLIPS:
            there = is_clip_model_in_single_file(CLIPS[kind], names)
        elif kind == T5:
            there = is_t5_in_single_file(names)
        else:
            there = not kind.startswith("Autoencoder") or any(name.startswith(AUTOENCODERS) for name in names)
        if not there:
            found.append(component)
    return found


def missing_tensors(modules: Mapping[str, object]) -> list[str]:
    """List parameters of loaded networks that a checkpoint had no values for: diffusers leaves them without data.

    Args:
        modules: Components of a pipeline by name.
    """
    networks = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    tensors = ((f"{name}/{path}", value) for name, part in networks.items() for path, value in part.named_parameters())
    return [path for path, value in tensors if value.is_meta]


def converted(tensors: Mapping[str, Tensor], module: nn.Module, prefix: str) -> dict[str, Tensor] | None:
    """A network of a checkpoint as diffusers' own conversion reads it, by canonical path.

    Args:
        tensors: Those of the file.
        module: The network that it should be: its config says how the names are to be read.
        prefix: What the names of its tensors begin with.

    Returns:
        Its tensors, or `None` where the conversion is written for networks of one size and this is of another.
    """
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    config = getattr(module, "config", None)
    if isinstance(module, UNet2DConditionModel):
        return convert_ldm_unet_checkpoint(own, config)
    if isinstance(module, AutoencoderKL):
        return convert_ldm_vae_checkpoint(own, config)
    if isinstance(module, SD3Transformer2DModel):
        return convert_sd3_transformer_checkpoint_to_diffusers(own)
    if isinstance(module, FluxTransformer2DModel):
        return convert_flux_transformer_checkpoint_to_diffusers(own) if module.inner_dim == FLUX_WIDTH else None
    read = convert_open_clip_checkpoint(module, own, prefix) if f"{prefix}text_projection" in own else None
    read = convert_ldm_clip_checkpoint(own) if read is None else read
    return {name.removeprefix("text_model."): tensor for name, tensor in read.items()}
