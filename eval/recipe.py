"""Fingerprints: what a number depends on, so that unlike ones are never mixed."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from erasure.artifact import Erasure
from erasure.backbones import backbone_for
from erasure.cache import module_fingerprint
from erasure.errors import EvaluationError
from erasure.eval.rows import Record
from erasure.eval.suites import Plan
from erasure.files import digest, read_bytes, tensor_infos
from erasure.interop import adapters, paths
from erasure.interop.pipelines import components_of

WEIGHTS_LIMIT = 16 * 2**30
"""Bytes of a file of a detector's weights."""


def sampler_recipe(pipe: DiffusionPipeline) -> Record:
    """Describe a pipeline's scheduler and precision."""
    scheduler, backbone = pipe.scheduler, backbone_for(pipe)
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return {
        "scheduler": f"{type(scheduler).__name__} ({digest(config)[:8]})",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "noise": "one CPU generator per sample, float32",
        "safety_checker": "off",
        **({} if backbone.length is None else {"max_sequence_length": backbone.length}),
    }


def judge_fingerprint(judge: object) -> str:
    """Give a detector's name and fingerprint.

    That is what it says of itself (`fingerprint` or `version`), sha256 of the weights in its folder, the weights of a
    network, or else sha256 of the source file that it is defined in.

    Raises:
        EvaluationError: A file of the folder cannot be read.
    """
    name = getattr(judge, "__name__", None) or type(judge).__name__
    for said in (getattr(judge, "fingerprint", None), getattr(judge, "version", None)):
        if isinstance(said, str | int | float):
            return str(said)
    folder = getattr(judge, "folder", None)
    if folder is not None:
        return f"{name} ({_files_fingerprint(Path(folder))})"
    if isinstance(judge, nn.Module):
        return f"{name} ({module_fingerprint(judge)[:12]})"
    try:
        source = inspect.getsourcefile(judge if callable(judge) and hasattr(judge, "__code__") else type(judge))
        return f"{name} (source {hashlib.sha256(Path(source or '').read_bytes()).hexdigest()[:12]})"
    except (OSError, TypeError):
        return name


def is_identified(judge: object) -> bool:
    """Whether a detector's fingerprint covers all that its answers depend on, so that answers may be cached."""
    names = ("fingerprint", "version", "folder")
    return isinstance(judge, nn.Module) or any(getattr(judge, name, None) is not None for name in names)


def _files_fingerprint(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            tensor_infos(file, error=EvaluationError)  # what does not fit its header is not worth the reading
        if file.suffix in (".json", ".safetensors", ".onnx"):
            found.update(read_bytes(file, WEIGHTS_LIMIT, error=EvaluationError))
    return found.hexdigest()[:12]


def user_additions(pipe: DiffusionPipeline) -> list[Record]:
    """Find what a user has put on a pipeline that changes images but not its own weights.

    LoRA adapters with their weights and scales, and FreeU.
    """
    found = []
    for name, component in components_of(pipe).items():
        entry = adapters.in_force(component) | paths.free_u(component)
        if entry:
            found.append({"component": name, **entry})
    return found


def erasure_entry(name: str, erasure: Erasure, strength: float) -> Record:
    """Describe an attached erasure for results."""
    config = erasure.config
    return {
        "name": name,
        "strategy": config.strategy,
        "concepts": [concept.get("target") for concept in config.concepts],
        "options": digest(config.strategy_config),
        "strength": strength,
        "seed": config.seed,
        "size_bytes": erasure.size_bytes,
        "seconds": config.cost.get("seconds"),
        "fingerprint": erasure.fingerprint,
    }


def run_recipe(
    plan: Plan, drawing: Record, judge: str, clip: str | None, erasures: list[Record]
) -> Record:  # fmt: skip
    """Give all that a folder of samples depends on; a run resumes only if this is the same.

    Args:
        plan: What is drawn.
        drawing: What images of the stock model depend on, see `drawing_recipe`.
        judge: Fingerprint of the detector.
        clip: Fingerprint of the CLIP model.
        erasures: Entries of the attached erasures.
    """
    return {
        "suite": plan.recipe,
        "concepts": [[target.name, target.domain, list(target.members)] for target in plan.targets],
        "samples": digest([sample.row() for sample in plan.samples]),
        **drawing,
        "judge": judge,
        "clip": clip,
        "erasures": in_force_entries(erasures),
    }


def drawing_recipe(pipe: DiffusionPipeline, model: str) -> Record:
    """Give all that an image of the stock model depends on, besides its sample.

    Args:
        pipe: The stock pipeline.
        model: Its fingerprint.
    """
    import diffusers

    besides = user_additions(pipe)
    return {
        "model": model,
        "sampler": sampler_recipe(pipe),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        **({"besides": besides} if besides else {}),
    }


def in_force_entries(erasures: list[Record]) -> list[Record]:
    """Describe the attached erasures as far as images depend on them, in the order in which they act."""
    return [{key: entry[key] for key in ("name", "strength", "fingerprint")} for entry in erasures]
