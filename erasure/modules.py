"""Finding modules and parameters, and the private parts of diffusers, transformers and PEFT that this package relies on.

Everything that reaches behind a public interface of those libraries is in this file, so that a change there costs one file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def transformer_root(module: nn.Module) -> tuple[str, nn.Module]:
    """Where the blocks of a text encoder hang: `CLIPTextModel` is flat, `CLIPTextModelWithProjection` nests `text_model`."""
    inner = getattr(module, "text_model", None)
    return ("text_model.", inner) if isinstance(inner, nn.Module) else ("", module)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside any PEFT wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def parameter(component: nn.Module, path: str) -> Tensor:
    """A parameter by canonical path: no `text_model.` prefix, PEFT wrappers looked through.

    Raises:
        AttributeError: There is none.
    """
    owner, name = path.rsplit(".", 1)
    module = base_layer(transformer_root(component)[1].get_submodule(owner))
    found = getattr(module, name, None)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{type(module).__name__} at {owner!r} has no parameter {name!r}")
    return found


def is_plain(tensor: Tensor) -> bool:
    """Whether a weight is an ordinary floating-point tensor, not quantised and not offloaded to nowhere."""
    ordinary = type(tensor) in (nn.Parameter, Tensor) and type(tensor.data) is Tensor
    return ordinary and tensor.dtype in PLAIN_DTYPES and tensor.device.type != "meta"


def is_fused(component: nn.Module, path: str) -> bool:
    """Whether an attention module runs with fused query-key-value projections."""
    try:
        attention = transformer_root(component)[1].get_submodule(path)
    except AttributeError:
        return False
    return bool(getattr(attention, "fused_projections", False))


@contextmanager
def without_offloading(pipe: DiffusionPipeline) -> Iterator[None]:
    """Take accelerate's offloading off while modules are changed, and put it back: diffusers' LoRA loader does the same."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
    from diffusers.loaders.lora_base import _func_optionally_disable_offloading

    device = getattr(pipe, "_offload_device", None)
    model, sequential, group = _func_optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        arguments: dict[str, Any] = {} if device is None else {"device": device}
        if model:
            pipe.enable_model_cpu_offload(**arguments)
        elif sequential:
            pipe.enable_sequential_cpu_offload(**arguments)
        elif group:
            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)


class CallGuard:
    """Runs a check ahead of every call of one method of one pipeline object.

    An object, not a closure: a deep copy of the pipeline then guards the copy.
    """

    def __init__(self, pipe: DiffusionPipeline, method: str, check: Callable[..., None]) -> None:
        self.pipe, self.method, self.check = pipe, method, check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check, then call the method of the pipeline's class."""
        self.check(self.pipe, *args, **kwargs)
        return getattr(type(self.pipe), self.method)(self.pipe, *args, **kwargs)

    @classmethod
    def install(cls, pipe: DiffusionPipeline, method: str, check: Callable[..., None]) -> None:
        """Guard a method (once)."""
        if not isinstance(vars(pipe).get(method), cls):
            setattr(pipe, method, cls(pipe, method, check))

    @classmethod
    def remove(cls, pipe: DiffusionPipeline, method: str) -> None:
        """Take the guard off again."""
        if isinstance(vars(pipe).get(method), cls):
            delattr(pipe, method)


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


def scale_lora(component: nn.Module, name: str, strength: float) -> int:
    """Set an adapter's strength; returns how many layers have it."""
    layers = [layer for layer in lora_layers(component) if name in layer.lora_A]
    for layer in layers:
        layer.set_scale(name, strength)
    return len(layers)


def delete_lora(component: Any, name: str) -> None:
    """Take an adapter off a component again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if hasattr(component, "delete_adapters"):
        component.delete_adapters(name)
    else:
        for layer in component.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.delete_adapter(name)
