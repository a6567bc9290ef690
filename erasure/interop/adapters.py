"""LoRA adapters of PEFT inside a component."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn


def add_lora(pipe: DiffusionPipeline, component: str, name: str, state: dict[str, Tensor], strength: float) -> None:
    """Add a LoRA adapter to one component through diffusers' own loader and keep the adapters that were active."""
    module = getattr(pipe, component)
    before = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    active = {id(layer): list(layer.active_adapters) for layer in before}
    prefix = component + "."
    state = {key: value for key, value in state.items() if key.startswith(prefix)}
    if component.startswith("text_encoder"):
        pipe.load_lora_into_text_encoder(state, None, module, prefix=component, adapter_name=name, _pipeline=pipe)
    else:
        pipe.load_lora_into_unet(state, None, module, adapter_name=name, _pipeline=pipe)
    for layer in lora_layers(module):
        others = [adapter for adapter in active.get(id(layer), []) if adapter in layer.lora_A]
        if name in layer.lora_A:
            layer.set_adapter([*others, name])
        elif others:
            layer.set_adapter(others)
    scale_lora(module, name, strength)


def lora_layers(component: nn.Module) -> list[Any]:
    """Every PEFT LoRA layer of a component."""
    return [layer for layer in component.modules() if hasattr(layer, "lora_A") and hasattr(layer, "set_scale")]


def scale_lora(component: nn.Module, name: str, strength: float) -> None:
    """Set an adapter's strength."""
    for layer in lora_layers(component):
        if name in layer.lora_A:
            layer.set_scale(name, strength)


def active_lora(component: nn.Module, name: str, strength: float) -> int:
    """In how many layers an adapter is in force with this strength."""
    return sum(
        name in layer.active_adapters and not layer.disable_adapters and abs(layer.scaling[name] - strength) < 1e-6
        for layer in lora_layers(component)
        if name in layer.lora_A
    )


def delete_lora(component: Any, name: str) -> None:
    """Take an adapter off a component again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if hasattr(component, "delete_adapters"):
        component.delete_adapters(name)
    else:
        for layer in component.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.delete_adapter(name)
