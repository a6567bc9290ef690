"""Write the trained parts as the shipped folders: `canvas-sd`, `canvas-clip`, `canvas-judge`, all fp16."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from erasure.assets import ROOT
from erasure.assets.build.denoiser import CONFIG, SCHEDULER
from erasure.assets.build.fit import trained
from erasure.assets.build.tokenizer import CONTEXT
from erasure.assets.world import ANCHORS, BACKGROUNDS, HELD_OUT_TEMPLATES, OBJECTS, STYLES, TEMPLATES, UNSAFE

GENERATION: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 2.0}
"""Settings that every evaluation of Canvas uses unless told otherwise."""


Part = TypeVar("Part", AutoencoderKL, UNet2DConditionModel)
"""A part that is saved by itself."""


def denoiser(work: Path) -> UNet2DConditionModel:
    """The denoiser of `canvas-sd`."""
    return trained(UNet2DConditionModel(**CONFIG), work, "unet")


def export_denoiser(work: Path, out: Path = ROOT) -> None:
    """Replace the denoiser of `canvas-sd` by the one that went on from it in `work`, and add to the record.

    The accuracies of the record are those of the former denoiser until `evaluate` has run.
    """
    folder = out / "canvas-sd"
    denoiser(work).to(torch.float16).save_pretrained(folder / "unet")
    file = folder / "canvas.json"
    described = json.loads(file.read_text())
    record, options = described["training"], json.loads((work / "unet.options.json").read_text())
    steps, hours = logged(work, "unet")
    record["steps"]["words"], record["hours"]["words"] = steps, hours
    record["samples"]["words"] = steps * per_step(options)
    record["words"] = options
    file.write_text(json.dumps(described, indent=2) + "\n")


def export(work: Path, out: Path = ROOT) -> None:
    """Write all three folders from what the training steps left in `work`.

    Where only a denoiser was trained on from the shipped one, it takes that one's place.
    """
    if not (work / "vae").is_dir():
        export_denoiser(work, out)
        return
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text = CLIPTextModel.from_pretrained(work / "clip")
    pipe = StableDiffusionPipeline(
        vae=anew(AutoencoderKL.from_pretrained(work / "vae")),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=denoiser(work),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = out / "canvas-sd"
    record = training_record(work)
    kept = (folder / "canvas.json").read_text() if (folder / "canvas.json").is_file() else None
    pipe.to(torch.float16).save_pretrained(folder)
    set_dtype(folder / "text_encoder" / "config.json", "float32")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, folder / "tokenizer" / name)
    if kept is not None and json.loads(kept).get("training", {}).get("steps") == record["steps"]:
        record["accuracy"] = json.loads(kept)["training"].get("accuracy", {})
    described = {**description(record), "ip_adapter": "canvas-ip-adapter"}
    (folder / "canvas.json").write_text(json.dumps(described, indent=2) + "\n")
    export_clip(CLIPModel.from_pretrained(work / "clip"), work, out / "canvas-clip")
    shutil.rmtree(out / "canvas-judge", ignore_errors=True)
    shutil.copytree(work / "judge", out / "canvas-judge")


def anew(model: Part) -> Part:
    """Copy a part, so that its config does not say where it was loaded from."""
    known = inspect.signature(type(model).__init__).parameters
    fresh = type(model)(**{key: value for key, value in model.config.items() if key in known})
    fresh.load_state_dict(model.state_dict())
    return fresh


def set_dtype(config: Path, dtype: str) -> None:
    """Name the dtype to load in: transformers takes it from the config, diffusers loads its parts in float32."""
    described = json.loads(config.read_text())
    config.write_text(json.dumps(described | {"dtype": dtype}, indent=2) + "\n")


def description(record: dict[str, Any], generation: dict[str, Any] = GENERATION) -> dict[str, Any]:
    """Make the content of `canvas.json`.

    Args:
        record: Of the training.
        generation: How the pipeline is called.
    """
    return {
        "objects": list(OBJECTS),
        "styles": list(STYLES),
        "backgrounds": list(BACKGROUNDS),
        "templates": list(TEMPLATES),
        "held_out_templates": list(HELD_OUT_TEMPLATES),
        "unsafe": list(UNSAFE),
        "groups": {name: thing.group for name, thing in OBJECTS.items()},
        "synonyms": {name: list(thing.synonyms) for name, thing in OBJECTS.items() if thing.synonyms},
        "anchors": ANCHORS,
        "generation": generation,
        "training": record,
    }


def training_record(work: Path) -> dict[str, Any]:
    """Steps, samples and hours of every part, from the logs of the training steps."""
    options = json.loads((work / "unet.options.json").read_text())
    batch = {"vae": 8, "clip": 128, "judge": 64, "unet": per_step(options)}
    steps, hours = {}, {}
    for part in batch:
        steps[part], hours[part] = logged(work, part)
    samples = {part: steps[part] * batch[part] for part in batch}
    return {
        "hardware": "2 CPU cores", "steps": steps, "samples": samples, "hours": hours, "words": options,
        "accuracy": {},
    }  # fmt: skip


def per_step(options: list[dict[str, float]]) -> int:
    """Samples of one step of the denoiser's training, in all processes."""
    return int(options[-1]["batch"] * options[-1]["processes"])


def logged(work: Path, part: str) -> tuple[int, float]:
    """Steps and hours of a part's training."""
    last = json.loads((work / f"{part}.jsonl").read_text().splitlines()[-1])
    seconds = torch.load(work / f"{part}.ckpt", map_location="cpu", weights_only=True)["seconds"]
    return last["step"], round(seconds / 3600, 2)


def export_clip(model: CLIPModel, work: Path, folder: Path) -> None:
    """Write the towers as an open_clip model that `local-dir:` loads."""
    text, vision = model.config.text_config, model.config.vision_config
    config = {
        "model_cfg": {
            "embed_dim": model.config.projection_dim,
            "vision_cfg": {
                "image_size": vision.image_size, "patch_size": vision.patch_size, "layers": vision.num_hidden_layers,
                "width": vision.hidden_size, "head_width": vision.hidden_size // vision.num_attention_heads,
            },
            "text_cfg": {
                "context_length": CONTEXT, "vocab_size": text.vocab_size, "width": text.hidden_size,
                "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
                "hf_tokenizer_name": "canvas-clip",
            },
        },
        "preprocess_cfg": {
            "size": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
        },
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "tokenizer", folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.half().contiguous() for name, tensor in open_clip_names(model.state_dict()).items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def open_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers CLIP state dict under open_clip's names and layouts."""
    made = {
        "logit_scale": state["logit_scale"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for ours, theirs in (
        ("ln_final", "text_model.final_layer_norm"),
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
    ):
        made |= {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for ours, theirs in (("", "text_model"), ("visual.", "vision_model")):
        layer = 0
        while f"{theirs}.encoder.layers.{layer}.layer_norm1.weight" in state:
            source, target = f"{theirs}.encoder.layers.{layer}", f"{ours}transformer.resblocks.{layer}"
            for part in ("weight", "bias"):
                made |= {f"{target}.{a}.{part}": state[f"{source}.{b}.{part}"] for a, b in parts.items()}
                joined = torch.cat([state[f"{source}.self_attn.{p}_proj.{part}"] for p in "qkv"])
                made[f"{target}.attn.in_proj_{part}"] = joined
            layer += 1
    return made
