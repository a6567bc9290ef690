"""Everything of a pipeline that can be seen, and small worlds and pipelines to look at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import erasure

from .model import COMPONENTS, encode, tensors_of


def hook_names(pipe: Any) -> list[str]:
    """Every hook on every module of a pipeline, sorted: what order does is seen in what is computed."""
    found = []
    for component in COMPONENTS:
        for name, module in getattr(pipe, component).named_modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in registry._hook_order if registry is not None else ():
                found.append(f"{component}/{name}: {hook}")
            found += [f"{component}/{name}: forward hook" for _ in module._forward_hooks]
            found += [f"{component}/{name}: pre-forward hook" for _ in module._forward_pre_hooks]
    return sorted(found)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors with their names and types."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else bytes(str(value.item()), "ascii"))
    return found.hexdigest()


def verifies(manager: Any) -> bool:
    """Whether `verify` passes; anything but a `VerificationError` is passed on."""
    from erasure.errors import VerificationError

    try:
        manager.verify()
    except VerificationError:
        return False
    return True


def look(pipe: Any) -> dict[str, Any]:
    """Everything that an operation could leave half done: weights, hooks, lists, encodings, flags, verification."""
    manager = erasure.ErasureManager(pipe)
    modules = [getattr(pipe, name) for name in COMPONENTS]
    return {
        "weights": digest(tensors_of(pipe)),
        "adapters": sorted(k for m in modules for k, _ in m.named_parameters() if ".lora_" in k),
        "hooks": hook_names(pipe),
        "encoding": digest({"states": encode(pipe)}),
        "active": sorted(manager.active_erasures()),
        "strengths": dict(sorted(manager.strengths.items())),
        "fused": sorted(manager.fused_erasures),
        "lists": {key: sorted(names) for key, names in sorted(manager.list_erasures().items())},
        "verifies": verifies(manager),
        "training": sum(part.training for m in modules for part in m.modules()),
        "learning": sum(p.requires_grad for m in modules for p in m.parameters()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Which parts of two looks differ; of hooks, which."""
    changed = [key for key in wanted if found[key] != wanted[key]]
    if "hooks" in changed:
        extra = sorted(set(found["hooks"]) ^ set(wanted["hooks"]))
        changed[changed.index("hooks")] = f"hooks ({'; '.join(extra[:2]) or 'in another order'})"
    return changed


# Worlds --------------------------------------------------------------------------------------------------------------

WORLD = {
    "objects": ["cat", "dog", "gun"], "styles": ["ink", "noto"], "unsafe": ["gun"],
    "groups": {"animal": ["cat", "dog"], "weapon": ["gun"]}, "synonyms": {"cat": ["kitten"]},
    "generation": {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 32},
}  # fmt: skip


def give_world(pipe: Any, folder: Path) -> None:
    """Let the suite `canvas` know a tiny pipeline: three objects, two styles."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "canvas.json").write_text(json.dumps(WORLD))
    pipe.register_to_config(_name_or_path=str(folder))


def colour_judge(images: Any) -> list[Any]:
    """Answers by the mean colour: arbitrary, but the same for the same image."""
    from types import SimpleNamespace

    answers = []
    for image in images:
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))
        answers.append(SimpleNamespace(
            object=WORLD["objects"][(red + green) // 8 % 3], objects=(), style=WORLD["styles"][blue // 8 % 2],
            shape=WORLD["objects"][red // 8 % 3], object_scores={"cat": 0.5},
        ))  # fmt: skip
    return answers


colour_judge.version = "colour_judge"  # type: ignore[attr-defined]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's arithmetic on one thread: the same bits in whatever thread a pipeline is called."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drop_in(pipe: Any) -> Any:
    """The drop-in pipeline over a stock one's components, with a scheduler of its own."""
    from erasure.pipelines import StableDiffusionErasurePipeline

    made = StableDiffusionErasurePipeline.from_pipe(pipe)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def relative(found: Tensor, wanted: Tensor) -> float:
    """Greatest difference, as a share of the greatest value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
