"""Fingerprints: what a number depends on, so that unlike ones are never mixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from erasure.artifact import Erasure
from erasure.errors import EvaluationError
from erasure.eval.rows import Record
from erasure.eval.samples import denoiser
from erasure.eval.suites import Plan
from erasure.files import digest, read_bytes, tensor_infos

WEIGHTS_LIMIT = 16 * 2**30
"""Bytes of a file of a detector's weights."""


def sampler_recipe(pipe: DiffusionPipeline) -> Record:
    """The scheduler of a pipeline and the precision it runs in."""
    scheduler = pipe.scheduler
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return {
        "scheduler": f"{type(scheduler).__name__} ({digest(config)[:8]})",
        "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
        "noise": "one CPU generator per sample, float32",
    }


def judge_fingerprint(judge: object) -> str:
    """Name of a detector, and sha256 of its weights when it has a folder.

    Raises:
        EvaluationError: A file of the folder cannot be read.
    """
    name = getattr(judge, "__name__", None) or type(judge).__name__
    folder = getattr(judge, "folder", None)
    if folder is None:
        return str(getattr(judge, "version", name))
    found = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.suffix == ".safetensors":
            tensor_infos(file, error=EvaluationError)  # what does not fit its header is not worth the reading
        if file.suffix in (".json", ".safetensors", ".onnx"):
            found.update(read_bytes(file, WEIGHTS_LIMIT, error=EvaluationError))
    return f"{name} ({found.hexdigest()[:12]})"


def erasure_entry(name: str, erasure: Erasure, strength: float) -> Record:
    """What results say about an attached erasure."""
    config = erasure.config
    return {
        "name": name,
        "strategy": config.strategy,
        "concepts": [concept.get("target") for concept in config.concepts],
        "strength": strength,
        "seed": config.seed,
        "size_bytes": erasure.size_bytes,
        "seconds": config.cost.get("seconds"),
        "fingerprint": erasure_fingerprint(erasure),
    }


def erasure_fingerprint(erasure: Erasure) -> str:
    """sha256 of the tensors of an erasure and of the options it was made with, 16 hex digits."""
    found = hashlib.sha256(digest([erasure.config.strategy, erasure.config.strategy_config]).encode())
    tensors = erasure.edits.delta_state_dict() | erasure.edits.lora_state_dict()
    for key, tensor in sorted(tensors.items()):
        found.update(key.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def run_recipe(
    plan: Plan, model: str, sampler: Record, judge: str, clip: str | None, erasures: list[Record]
) -> Record:
    """All that a folder of samples depends on; a run resumes only when it is the same."""
    import diffusers

    return {
        "suite": plan.recipe,
        "concepts": [[target.name, target.domain, list(target.members)] for target in plan.targets],
        "samples": digest([sample.row() for sample in plan.samples]),
        "model": model,
        "sampler": sampler,
        "judge": judge,
        "clip": clip,
        "erasures": [{key: entry[key] for key in ("name", "strength", "fingerprint")} for entry in erasures],
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
