"""Stand-ins for what ComfyUI's loaders give, with its rules of names and patches, and our models in them.

Written from what ComfyUI does (`comfy/lora.py`, `comfy/model_patcher.py`, `comfy/sd.py`, `folder_paths.py`). Names of
tensors are those of published files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from erasure.backbones import backbone_for
from erasure.backbones.layouts import to_original
from erasure.exchange.checkpoints import tensors_of

ENCODERS = {
    "stable-diffusion": {"text_encoder": "clip_l"},
    "stable-diffusion-xl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "stable-diffusion-3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
}
"""What ComfyUI calls the text encoders of a family."""
CLIP_LAYERS = re.compile(r"(clip_[lgh])\.transformer\.text_model\.encoder\.layers\.(\d+)\.(.+)\.weight")


class Network(nn.Module):
    """A network that only has tensors, under the names that they have in ComfyUI."""

    def __init__(self, tensors: dict[str, Tensor], paths: dict[str, str]) -> None:
        super().__init__()
        self.held = {key: tensor.clone() for key, tensor in tensors.items()}
        self.paths = paths
        """Names of tensors by diffusers' paths of the modules."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return dict(self.held)


class ModelPatcher:
    """Patches of a network: copies share its tensors, and each has patches of its own."""

    def __init__(self, model: Network) -> None:
        self.model = model
        self.patches: dict[str, list[tuple[float, Any]]] = {}

    def clone(self) -> ModelPatcher:
        copy = ModelPatcher(self.model)
        copy.patches = {key: list(patches) for key, patches in self.patches.items()}
        return copy

    def add_patches(self, patches: dict[Any, Any], strength_patch: float = 1.0) -> list[Any]:
        there = [target for target in patches if (target if isinstance(target, str) else target[0]) in self.model.held]
        for target in there:
            key, place = (target, None) if isinstance(target, str) else target
            self.patches.setdefault(key, []).append((strength_patch, patches[target], place))
        return there

    def get_key_patches(self) -> dict[str, list[Any]]:
        def unpack(tensor: Tensor, **options: Any) -> Tensor:
            return tensor

        return {key: [(tensor, unpack), *self.patches.get(key, [])] for key, tensor in self.model.held.items()}

    def patched(self, key: str) -> Tensor:
        """A tensor as it is when the network runs."""
        return calculate_weight(self.patches.get(key, []), self.model.held[key].float().clone(), key)


class CLIP:
    """Text encoders: a network and its patches."""

    def __init__(self, model: Network) -> None:
        self.cond_stage_model, self.patcher = model, ModelPatcher(model)

    def clone(self) -> CLIP:
        copy = CLIP(self.cond_stage_model)
        copy.patcher = self.patcher.clone()
        return copy

    def add_patches(self, patches: dict[Any, Any], strength_patch: float = 1.0) -> list[Any]:
        return self.patcher.add_patches(patches, strength_patch)


# Rules of names ------------------------------------------------------------------------------------------------------


def model_lora_keys_unet(model: Network, names: dict[str, Any]) -> dict[str, Any]:
    """Every weight by its name with underscores, and of UNets by diffusers'; every parameter by its own name."""
    for key in model.held:
        stem = key.removesuffix(".weight")
        if not key.startswith("diffusion_model."):
            continue
        names[stem] = key
        if stem != key:
            names[f"lora_unet_{stem.removeprefix('diffusion_model.').replace('.', '_')}"] = key
    names |= {f"lora_unet_{path.replace('.', '_')}": key for path, key in model.paths.items()}
    return names


def model_lora_keys_clip(model: Network, names: dict[str, Any]) -> dict[str, Any]:
    """CLIP's linear layers by number, T5's as the third (in Flux the second too), and every weight by its own name."""
    held = [key for key in model.held if key.endswith(".weight")]
    kinds = {key.split(".")[0] for key in held}
    for key in held:
        names[f"text_encoders.{key.removesuffix('.weight')}"] = key
        if (match := CLIP_LAYERS.fullmatch(key)) and match[3].startswith(("mlp.", "self_attn.")):
            number = "2" if match[1] == "clip_g" and "clip_l" in kinds else "1"
            layer = f"text_model_encoder_layers_{match[2]}_{match[3].replace('.', '_')}"
            names[f"lora_te{number}_{layer}"] = key
            if number == "1":
                names[f"lora_te_{layer}"] = key
        elif key.startswith("t5xxl.transformer."):
            path = key.removeprefix("t5xxl.transformer.").removesuffix(".weight").replace(".", "_")
            clips = len(kinds - {"t5xxl"})
            names |= {f"lora_te{number}_{path}": key for number in {clips + 1, 3 if clips else 1}}
    return names


def load_lora(lora: dict[str, Tensor], to_load: dict[str, Any]) -> dict[Any, Any]:
    """Patches by what they patch; names that nobody asks for are passed over."""
    patches: dict[Any, Any] = {}
    for name, target in to_load.items():
        if f"{name}.lora_up.weight" in lora:
            alpha = lora.get(f"{name}.alpha")
            down, up = lora[f"{name}.lora_down.weight"], lora[f"{name}.lora_up.weight"]
            scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
            patches[target] = ("lora", up, down, scale)
        if f"{name}.diff" in lora:
            patches[target] = ("diff", lora[f"{name}.diff"])
        if f"{name}.diff_b" in lora:
            patches[f"{target.removesuffix('.weight')}.bias"] = ("diff", lora[f"{name}.diff_b"])
    return patches


def calculate_weight(patches: list[Any], weight: Tensor, key: str) -> Tensor:
    """A weight with its patches; what does not fit is passed over."""
    for strength, patch, place in patches:
        part = weight if place is None else weight.narrow(*place)
        if patch[0] == "lora":
            _, up, down, scale = patch
            change = scale * (up.float().flatten(1) @ down.float().flatten(1))
            if change.numel() == part.numel():
                part += strength * change.view(part.shape)
        elif patch[0] == "set":
            part.copy_(patch[1])
        elif patch[1].shape == part.shape:
            part += strength * patch[1].float()
    return weight


# The program ---------------------------------------------------------------------------------------------------------


class ProgressBar:
    """Counts."""

    def __init__(self, total: int) -> None:
        self.total, self.steps = total, list[int]()
        PROGRESS.append(self)

    def update_absolute(self, value: int, total: int | None = None) -> None:
        self.steps.append(value)


PROGRESS: list[ProgressBar] = []


def program(models_dir: Path) -> dict[str, ModuleType]:
    """ComfyUI's modules that nodes import."""
    folders: dict[str, list[str]] = {name: [str(models_dir / name)] for name in ("diffusers", "checkpoints")}

    def add(name: str, folder: str) -> None:
        known = folders.setdefault(name, [])
        known += [] if folder in known else [folder]

    comfy = ModuleType("comfy")
    parts: dict[str, dict[str, Any]] = {
        "lora": {
            "model_lora_keys_unet": model_lora_keys_unet, "model_lora_keys_clip": model_lora_keys_clip,
            "load_lora": load_lora, "calculate_weight": calculate_weight,
        },
        "utils": {"ProgressBar": ProgressBar},
        "model_management": {
            "get_torch_device": lambda: torch.device("cpu"), "unload_all_models": lambda: None,
            "soft_empty_cache": lambda: None, "throw_exception_if_processing_interrupted": lambda: None,
        },
    }  # fmt: skip
    modules = {"comfy": comfy}
    for name, held in parts.items():
        modules[f"comfy.{name}"] = ModuleType(f"comfy.{name}")
        vars(modules[f"comfy.{name}"]).update(held)
        setattr(comfy, name, modules[f"comfy.{name}"])
    paths = modules["folder_paths"] = ModuleType("folder_paths")
    vars(paths).update(
        models_dir=str(models_dir), add_model_folder_path=add, get_folder_paths=lambda name: list(folders[name])
    )
    return modules


# Models --------------------------------------------------------------------------------------------------------------


def named(pipe: Any, component: str) -> dict[str, Tensor]:
    """The tensors of a component as ComfyUI names them."""
    backbone = backbone_for(pipe)
    tensors = tensors_of(pipe, component)
    if component == backbone.denoiser_component:
        layout = backbone.published_layout(backbone.denoiser)
        assert layout is not None
        return to_original(tensors, layout, "diffusion_model.")
    encoder = ENCODERS[backbone.family][component]
    if isinstance(getattr(pipe, component), T5EncoderModel):
        return {
            f"{encoder}.transformer.{path}": tensor for path, tensor in tensors.items() if "embed_tokens" not in path
        }
    inside: Callable[[str], str] = lambda path: "" if path.startswith("text_projection") else "text_model."  # noqa: E731
    return {f"{encoder}.transformer.{inside(path)}{path}": tensor for path, tensor in tensors.items()}


def loaded(pipe: Any, dtype: torch.dtype = torch.float32) -> tuple[ModelPatcher, CLIP]:
    """What ComfyUI's loader of checkpoints would give for a pipeline."""
    backbone = backbone_for(pipe)
    layout = backbone.published_layout(backbone.denoiser)
    assert layout is not None
    paths: dict[str, str] = {}
    if backbone.denoiser_component == "unet":
        # ComfyUI has no name of this kind for what reads the size of SDXL's pictures.
        for path in tensors_of(pipe, "unet"):
            place = layout(path)
            if place is not None and path.endswith(".weight") and not path.startswith("add_embedding"):
                paths[path.removesuffix(".weight")] = f"diffusion_model.{place.key}"
    denoiser = named(pipe, backbone.denoiser_component)
    text = {key: tensor for component in ENCODERS[backbone.family] for key, tensor in named(pipe, component).items()}
    model = Network({key: tensor.to(dtype) for key, tensor in denoiser.items()}, paths)
    encoders = Network({key: tensor.to(dtype) for key, tensor in text.items()}, {})
    return ModelPatcher(model), CLIP(encoders)


def expected(pipe: Any) -> SimpleNamespace:
    """The tensors of a pipeline, as they are now, under ComfyUI's names: `model` and `clip`."""
    backbone = backbone_for(pipe)
    text = {key: tensor for component in ENCODERS[backbone.family] for key, tensor in named(pipe, component).items()}
    return SimpleNamespace(model=named(pipe, backbone.denoiser_component), clip=text)
