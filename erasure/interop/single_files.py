"""Single-file checkpoints, as ComfyUI and A1111 read them: which pipeline of diffusers one holds."""

from __future__ import annotations

from pathlib import Path

from diffusers.loaders.single_file_utils import SingleFileComponentError, infer_diffusers_model_type

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
