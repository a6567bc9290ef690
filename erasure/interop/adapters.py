"""LoRA adapters that a user put on a component with PEFT."""

from __future__ import annotations

import hashlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from erasure.interop import paths


def tuner_layers(component: nn.Module) -> list[BaseTunerLayer]:
    """List the layers of a component that PEFT has wrapped."""
    return [part for part in component.modules() if isinstance(part, BaseTunerLayer)]


def wrapper_at(component: nn.Module, path: str) -> BaseTunerLayer | None:
    """The PEFT wrapper around the layer at a canonical path, or `None`."""
    found = paths.transformer_root(component).get_submodule(path)
    return found if isinstance(found, BaseTunerLayer) else None


def names_in_force(component: nn.Module) -> set[str]:
    """Names of the adapters that change what a component computes now, added to its layers or merged into them."""
    found: set[str] = set()
    for part in tuner_layers(component):
        found |= {*part.merged_adapters, *(() if part.disable_adapters else part.active_adapters)}
    return found


def in_force(component: nn.Module) -> dict[str, object]:
    """Names, scales and a fingerprint of the weights of the adapters in force; empty without any."""
    digest, scales = hashlib.sha256(), {}
    for part in tuner_layers(component):
        active = () if part.disable_adapters else part.active_adapters
        for name in sorted({*active, *part.merged_adapters}):
            scales[name] = getattr(part, "scaling", {}).get(name)
            for key, tensor in sorted(part.state_dict().items()):
                if f".{name}." in f".{key}.":
                    digest.update(f"{name} {scales[name]} {key} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return {"adapters": scales, "fingerprint": digest.hexdigest()[:16]} if scales else {}


def merged_names(component: nn.Module) -> list[str]:
    """Names of the adapters that are merged into weights (`fuse_lora`)."""
    return sorted({name for part in tuner_layers(component) for name in part.merged_adapters})


@torch.no_grad()
def merged_delta(wrapper: BaseTunerLayer | None) -> Tensor | None:
    """Compute what merged adapters have added to a layer's weight, float32 on the CPU; `None` for nothing.

    Raises:
        ValueError: An adapter is not merged by addition (DoRA scales the weight).
    """
    if wrapper is None:
        return None
    names = list(wrapper.merged_adapters)
    if any(getattr(wrapper, "use_dora", {}).get(name) for name in names):
        raise ValueError("DoRA adapters scale the weight that they are merged into")
    deltas = [wrapper.get_delta_weight(name).float().cpu() for name in names]
    return torch.stack(deltas).sum(0) if deltas else None


@torch.no_grad()
def foreign_delta(wrapper: BaseTunerLayer | None) -> Tensor | None:
    """Compute what adapters add to a layer's weight, merged or not, float32 on the CPU; `None` for nothing."""
    if wrapper is None or not hasattr(wrapper, "get_delta_weight"):
        return None
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    names = [name for name in {*active, *wrapper.merged_adapters} if name in getattr(wrapper, "lora_A", ())]
    deltas = [wrapper.get_delta_weight(name).float().cpu() for name in names]
    return torch.stack(deltas).sum(0) if deltas else None


def unwrap(component: nn.Module) -> None:
    """Replace PEFT's wrappers by the layers inside, and forget the adapters."""
    wrapped = [
        (parent, name, child)
        for parent in component.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(component).pop(attribute, None)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a module is a PEFT wrapper of a layer."""
    return isinstance(module, BaseTunerLayer)
