"""Recognise files and folders that were named as a model or as an erasure and are neither."""

from __future__ import annotations

import os
from pathlib import Path

from erasure.errors import ErasureError

ERASURE_FILE, MODEL_FILE, LORA_FILE = "erasure_config.json", "model_index.json", "pytorch_lora_weights.safetensors"
CONCEPTS_FILE = "concepts_config.json"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
"""Endings of files that run code when they are read."""
CHECKPOINT = "a single-file checkpoint, as ComfyUI and A1111 read it"
CONVERT = (
    "erasure.load_pipeline(FILE) reads it, and commands that draw take it as --model; elsewhere name the folder that "
    "its save_pretrained writes"
)
FOLDERS = "name a folder that save_pretrained (a model) or `erasure erase` (an erasure) has written"
LORA = "a LoRA"
LOAD_LORA = "pipe.load_lora_weights(FILE) loads it beside erasures, and `erasure import FILE` makes an erasure of it"
SIGNS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("lora_", ".lora_", ".lora.", ".hada_", ".lokr_"), LORA, LOAD_LORA),
    (
        ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "double_blocks.", "joint_blocks."),
        CHECKPOINT, CONVERT,
    ),
    (
        ("W_dec", "W_enc", "decoder.weight"), "a dictionary (sparse autoencoder)",
        "name its folder as --dictionary of the strategy itd",
    ),
    (
        ("emb_params", "string_to_param"), "a learned token (textual inversion)",
        "pipe.load_textual_inversion(FILE) loads it, and its word can be erased then",
    ),
    (
        ("down_blocks.", "transformer_blocks.", "text_model.", "encoder.block.", "decoder.up_blocks."),
        "one component of a model", "name the folder that holds its model_index.json",
    ),
)  # fmt: skip
"""Parts of tensors' names, what a file with such is, and what to do with it."""


def advice(path: str | Path) -> str | None:
    """Say what a file or folder is, and what to do with it; `None` where nothing is there or nothing is known.

    Nothing but the names of tensors is read, and never a pickle.

    Returns:
        How a sentence goes on that begins with "this is no model, but".
    """
    path = Path(path)
    if os.path.isdir(path):
        if os.path.isfile(path / MODEL_FILE):
            return "a model: name it as --model, or load it with erasure.load_pipeline(FOLDER)"
        if os.path.isfile(path / ERASURE_FILE):
            return "an erasure: name it as --erasure, or load it with pipe.load_erasure(FOLDER)"
        if os.path.isfile(path / CONCEPTS_FILE):
            return "a folder of learned concepts: name it as --learned, or load it with pipe.load_concepts(FOLDER)"
        return f"{LORA}: {LOAD_LORA}" if os.path.isfile(path / LORA_FILE) else None
    if not os.path.isfile(path):
        return None
    if os.path.isfile(path.parent / ERASURE_FILE) or os.path.isfile(path.parent / MODEL_FILE):
        return f"a file: give the folder that holds it, {path.parent}"
    if path.suffix.lower() in PICKLES:
        return (
            f"a {path.suffix} file, which may hold a pickle that runs code when it is read, and is not read here: "
            "fetch or convert it to .safetensors"
        )
    if path.suffix.lower() != ".safetensors":
        return f"a file: {FOLDERS}"
    found, what_to_do = _kind(path)
    return f"{found}: {what_to_do}"


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path leads to a single-file checkpoint of a whole model; see `advice`."""
    path = Path(path)
    return os.path.isfile(path) and path.suffix.lower() == ".safetensors" and _kind(path)[0] == CHECKPOINT


def _kind(path: Path) -> tuple[str, str]:
    """Tell what a safetensors file holds by the names of its tensors."""
    from erasure.files.tensors import tensor_infos

    try:
        names = tensor_infos(path)
    except ErasureError as reason:
        return "a damaged file", str(reason)
    for signs, what, what_to_do in SIGNS:
        if any(sign in name for name in names for sign in signs):
            return what, what_to_do
    return "a safetensors file of no kind that is known here", FOLDERS
