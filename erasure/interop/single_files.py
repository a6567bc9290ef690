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
    infer_diffusers_model_type,
)
from torch import Tensor, nn

from erasure.errors import UnsupportedModelError
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
MOST_BYTES = 2**40
FLUX_WIDTH = 3072
"""Width of FLUX.1's transformer, the only one that diffusers' conversion splits rightly."""


def stock_class(path: str | Path) -> str:
    """Name of the class of diffusers whose pipeline a checkpoint holds; only names and shapes of tensors are read.

    Raises:
        UnsupportedModelError: A checkpoint of another kind.
        ArtifactError: The file is damaged.
    """
    infos = tensor_infos(path, limit_bytes=MOST_BYTES)
    try:
        kind = infer_diffusers_model_type(infos)
    except IndexError:  # a tensor by which kinds are told apart has another number of axes
        kind = "v1"
    if kind not in STOCK or (kind == "v1" and V1 not in infos):  # what diffusers does not know it calls v1
        what = "no kind that is known" if kind == "v1" else f"the kind {kind!r}"
        raise UnsupportedModelError(
            f"{shown(str(path), 200)} is a single-file checkpoint of {what}; supported: {', '.join(STOCK)}. Load it "
            "with the class of its model and save_pretrained, if there is one"
        )
    return STOCK[kind]


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
