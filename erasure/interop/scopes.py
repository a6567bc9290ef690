"""Passing states of a component or a pipeline: what holds inside of a `with` block and is undone behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.interop.paths import layer, parameter


@contextmanager
def swapped(component: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, by canonical path, each cast to its parameter's dtype.

    Differentiable in `values`; the parameters themselves are put back untouched.
    """
    before = []
    try:
        for path, value in values.items():
            owner, name = path.rsplit(".", 1)
            module = layer(component, owner)
            before.append((module, name, module._parameters[name]))
            module._parameters[name] = value.to(parameter(component, path).dtype)  # type: ignore[assignment]
        yield
    finally:
        for module, name, stock in reversed(before):
            module._parameters[name] = stock


@contextmanager
def frozen(*components: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside, and no dropout is in force; both are afterwards as they were."""
    parts = [part for component in components for part in component.modules()]
    training = [part for part in parts if part.training]
    learning = [p for component in components for p in component.parameters() if p.requires_grad]
    try:
        for part in training:
            part.training = False
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for part in training:
            part.training = True


@contextmanager
def placed(components: Sequence[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Components are on a device inside, and where they were afterwards."""
    before = [next(component.parameters()).device for component in components]
    try:
        for component in components:
            component.to(device)
        yield
    finally:
        for component, home in zip(components, before, strict=True):
            component.to(home)


@contextmanager
def gradient_checkpointing(component: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """`run(block, *args)` runs the blocks of a denoiser inside; afterwards checkpointing is as it was."""
    before = [
        (part, part.gradient_checkpointing, getattr(part, "_gradient_checkpointing_func", None))
        for part in component.modules()
        if hasattr(part, "gradient_checkpointing")
    ]
    try:
        component.enable_gradient_checkpointing(run)  # type: ignore[operator]
        yield
    finally:
        for part, was_on, function in before:
            part.gradient_checkpointing = was_on
            part._gradient_checkpointing_func = function  # type: ignore[assignment]


@contextmanager
def without_offloading(pipe: DiffusionPipeline) -> Iterator[None]:
    """Take accelerate's offloading off while modules are changed, and put it back, as diffusers' LoRA loader does."""
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


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar is off inside."""
    previous = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(previous or {}), "disable": True})
    try:
        yield
    finally:
        if previous is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = previous
