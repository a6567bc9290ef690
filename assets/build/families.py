"""Write `canvas-flux`, `canvas-sdxl` and `canvas-sd3` from trained parts, all fp16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, T5TokenizerFast

from erasure.assets import ROOT
from erasure.assets import path as embedded
from erasure.assets.build import denoiser, flux, sd3, towers, xl
from erasure.assets.build.export import GENERATION, description, logged, set_dtype
from erasure.assets.build.fit import trained
from erasure.assets.build.tokenizer import CONTEXT
from erasure.assets.world import IMAGE_SIZE

SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
LENGTH = {"max_sequence_length": CONTEXT}
"""T5 attends to its padding, so a prompt of another length is another prompt."""


def write_flux(work: Path, out: Path = ROOT) -> Path:
    """Write `canvas-flux`: guided by itself where the step `distil` has begun, else by two passes a step."""
    alone = any((work / name).exists() for name in ("guided", "guided.ckpt"))
    name = "guided" if alone else "transformer"
    transformer = trained(FluxTransformer2DModel(**flux.CONFIG | {"guidance_embeds": alone}), work, name)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**flux.SCHEDULER),
        vae=autoencoder(shift_factor=0.0),
        text_encoder=CLIPTextModel.from_pretrained(embedded("canvas-sd") / "text_encoder"),
        tokenizer=towers.tokenizer(),
        text_encoder_2=T5EncoderModel.from_pretrained(work / "t5"),
        tokenizer_2=T5TokenizerFast.from_pretrained(work / "tokenizer_2"),
        transformer=transformer,
    )
    guidance = {"guidance_scale": 2.0} if alone else {"guidance_scale": 1.0, "true_cfg_scale": 2.0}
    settings = {"num_inference_steps": 12, **guidance, **SIZE, **LENGTH}
    parts = ("t5", "transformer", *(("guided",) if alone else ()))
    return write(pipe, out / "canvas-flux", record(work, parts), settings)


def write_xl(work: Path, out: Path = ROOT) -> Path:
    """Write `canvas-sdxl`."""
    pieces = towers.tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=towers.first_tower(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(work / "clip-2"),
        tokenizer=pieces,
        tokenizer_2=towers.tokenizer(),
        unet=trained(UNet2DConditionModel(**xl.CONFIG), work, "unet-xl"),
        scheduler=DDIMScheduler(**denoiser.SCHEDULER),
        add_watermarker=False,
    )
    return write(pipe, out / "canvas-sdxl", record(work, ("clip-2", "unet-xl")), {**GENERATION, **SIZE})


def write_sd3(work: Path, out: Path = ROOT) -> Path:
    """Write `canvas-sd3`."""
    pipe = StableDiffusion3Pipeline(
        transformer=trained(SD3Transformer2DModel(**sd3.CONFIG), work, "transformer-3"),
        scheduler=FlowMatchEulerDiscreteScheduler(**sd3.SCHEDULER),
        vae=autoencoder(shift_factor=0.0),
        text_encoder=towers.with_projection(towers.first_tower()),
        tokenizer=towers.tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(work / "clip-2"),
        tokenizer_2=towers.tokenizer(),
        text_encoder_3=T5EncoderModel.from_pretrained(work / "t5"),
        tokenizer_3=T5TokenizerFast.from_pretrained(work / "tokenizer_2"),
    )
    settings = {"num_inference_steps": 12, "guidance_scale": 2.0, **SIZE, **LENGTH}
    return write(pipe, out / "canvas-sd3", record(work, ("t5", "clip-2", "transformer-3")), settings)


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "canvas-flux": write_flux, "canvas-sdxl": write_xl, "canvas-sd3": write_sd3,
}  # fmt: skip
"""Functions that write each model, from the folder of its training into another."""


def autoencoder(**changed: Any) -> AutoencoderKL:
    """The autoencoder of `canvas-sd`, with other values in its config."""
    vae = AutoencoderKL.from_pretrained(embedded("canvas-sd") / "vae")
    vae.register_to_config(**changed)
    return vae


def record(work: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """Steps, hours and options of every part's training; the accuracies are those of none yet."""
    steps, hours = {}, {}
    for part in parts:
        steps[part], hours[part] = logged(work, part)
    options = {part: work / f"{part}.options.json" for part in parts}
    noted = {part: json.loads(file.read_text()) for part, file in options.items() if file.is_file()}
    samples = {part: int(steps[part] * rows[-1]["batch"] * rows[-1]["processes"]) for part, rows in noted.items()}
    devices = sorted({row["device"] for rows in noted.values() for row in rows})
    return {
        "hardware": ", ".join(devices), "steps": steps, "samples": samples, "hours": hours, "options": noted,
        "accuracy": {},
    }  # fmt: skip


def write(pipe: DiffusionPipeline, folder: Path, trained: dict[str, Any], settings: dict[str, Any]) -> Path:
    """Write a pipeline in place of a folder, with what `canvas.json` says of it.

    Args:
        pipe: In float32.
        folder: Where it is written.
        trained: Record of the training.
        settings: How the pipeline is called.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name, kind in index.items():
        if isinstance(kind, list) and kind[0] == "transformers" and (folder / name / "config.json").is_file():
            set_dtype(folder / name / "config.json", "float32")
        if isinstance(kind, list) and kind[1] == "T5Tokenizer":
            # The class of this name wants sentencepiece before transformers 5; both versions have the fast one.
            index[name] = ["transformers", "T5TokenizerFast"]
        if isinstance(kind, list) and kind[1] == "CLIPTokenizer":
            for file in ("vocab.json", "merges.txt"):
                shutil.copy(embedded("canvas-sd") / "tokenizer" / file, folder / name / file)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    unnamed(folder)
    (folder / "canvas.json").write_text(json.dumps(description(trained, settings), indent=2) + "\n")
    return folder


def unnamed(folder: Path) -> None:
    """Take out of the configs where the parts were loaded from."""
    for file in (*folder.glob("*.json"), *folder.glob("*/*config.json")):
        described = json.loads(file.read_text())
        kept = {key: value for key, value in described.items() if key != "_name_or_path"}
        if kept != described:
            file.write_text(json.dumps(kept, indent=2) + "\n")
