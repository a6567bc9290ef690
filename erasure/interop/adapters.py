"""LoRA adapters that a user put on a component with PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def tuner_layers(component: nn.Module) -> list[BaseTunerLayer]:
    """Every layer of a component that PEFT has wrapped."""
    return [part for part in component.modules() if isinstance(part, BaseTunerLayer)]


def wrapper_of(component: nn.Module, layer: nn.Module) -> Any:
    """The PEFT wrapper around a layer, or `None`."""
    return next((part for part in tuner_layers(component) if part.get_base_layer() is layer), None)


def is_in_force(component: nn.Module) -> bool:
    """Whether an adapter changes what a component computes now, added to its layers or merged into them."""
    return any(part.merged or (part.active_adapters and not part.disable_adapters) for part in tuner_layers(component))


def merged_names(component: nn.Module) -> list[str]:
    """Names of the adapters that are merged into weights (`fuse_lora`)."""
    return sorted({name for part in tuner_layers(component) for name in part.merged_adapters})


@torch.no_grad()
def merged_delta(wrapper: Any) -> Tensor | None:
    """What merged adapters have added to a wrapped layer's weight, in float32 on the CPU; `None` for nothing.

    Raises:
        ValueError: An adapter that is not merged by adding (DoRA scales the weight).
    """
    names = [] if wrapper is None else list(wrapper.merged_adapters)
    if any(getattr(wrapper, "use_dora", {}).get(name) for name in names):
        raise ValueError("DoRA adapters scale the weight that they are merged into")
    deltas = [wrapper.get_delta_weight(name).float().cpu() for name in names]
    return torch.stack(deltas).sum(0) if deltas else None


@torch.no_grad()
def added_delta(wrapper: Any) -> Tensor | None:
    """What a wrapped layer's active adapters add to its weight, in float32 on the CPU; `None` for nothing."""
    if wrapper is None or wrapper.disable_adapters or not hasattr(wrapper, "get_delta_weight"):
        return None
    names = [name for name in wrapper.active_adapters if name in getattr(wrapper, "lora_A", ())]
    deltas = [wrapper.get_delta_weight(name).float().cpu() for name in names if name not in wrapper.merged_adapters]
    return torch.stack(deltas).sum(0) if deltas else None


def unwrap(component: nn.Module) -> None:
    """Put the layers inside PEFT's wrappers back in their place and forget the adapters."""
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
