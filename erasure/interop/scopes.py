"""Temporary states of a component or a pipeline, which are undone at the end of a `with` block."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    GroupOffloadingConfig,
    _get_top_level_group_offload_hook,
    _is_group_offload_enabled,
)
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor, nn

from erasure.interop.paths import layer, parameter


@contextmanager
def swapped(component: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace parameters, named by canonical path, by other tensors, cast to each parameter's dtype.

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
    """Switch parameters' gradients and dropout off inside of the block, and restore them afterwards."""
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
def same_gradient_mode() -> Iterator[None]:
    """Restore the gradient mode at the end of the block; also a decorator.

    Ctrl-C on entering or leaving `torch.no_grad()` keeps gradients off for the rest of the program.
    """
    before = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


@contextmanager
def plain_precision() -> Iterator[None]:
    """Switch autocast off inside of the block; also a decorator.

    Within a caller's `torch.autocast`, edits and comparisons would be computed in half precision.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def placed(components: Sequence[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Move components to a device inside of the block, and back afterwards."""
    before = [next(component.parameters()).device for component in components]
    try:
        for component in components:
            component.to(device)
        yield
    finally:
        for component, home in zip(components, before, strict=True):
            component.to(home)


@contextmanager
def gradient_checkpointing(component: nn.Module, run: Callable[..., object]) -> Iterator[None]:
    """Run a denoiser's blocks by `run(block, *args)` inside of the block, and restore checkpointing afterwards."""
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
def without_offloading(pipe: DiffusionPipeline) -> Iterator[Callable[[DiffusionPipeline], None]]:
    """Suspend offloading while modules are changed or copied, as diffusers' LoRA loader does.

    Yields a function that applies the same offloading to another pipeline.
    """
    from diffusers.hooks.group_offloading import _apply_group_offloading
    from diffusers.loaders.lora_base import _func_optionally_disable_offloading

    device = getattr(pipe, "_offload_device", None)
    model, sequential, _ = _func_optionally_disable_offloading(pipe)
    groups = _remove_groups(pipe)

    def put_back(target: DiffusionPipeline) -> None:
        arguments: dict[str, torch.device | str] = {} if device is None else {"device": device}
        if model:
            target.enable_model_cpu_offload(**arguments)
        elif sequential:
            target.enable_sequential_cpu_offload(**arguments)
        for name, config in groups.items():
            _apply_group_offloading(getattr(target, name), config)

    try:
        yield put_back
    finally:
        put_back(pipe)


def _remove_groups(pipe: DiffusionPipeline) -> dict[str, GroupOffloadingConfig]:
    """Take group offloading off a pipeline, and give its settings by component.

    Its hooks hold streams and modules of torch, which cannot be copied. The weights are then where all others are: on
    the device to which they are offloaded if every network is offloaded in groups, and else where they are run.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found = {name: hook.config for name, part in parts.items() if (hook := _get_top_level_group_offload_hook(part))}
    for name, config in found.items():
        registry = HookRegistry.check_if_exists_or_initialize(parts[name])
        for kind in (_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING):
            registry.remove_hook(kind, recurse=True)
        parts[name].to(config.offload_device if len(found) == len(parts) else config.onload_device)
    return found


def is_offloaded(pipe: DiffusionPipeline) -> bool:
    """Whether diffusers moves the weights of a pipeline around while it draws."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    hooked = any(hasattr(part, "_hf_hook") for component in parts for part in component.modules())
    return hooked or any(_is_group_offload_enabled(part) for part in parts)


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Switch the pipeline's progress bar off inside of the block."""
    previous = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(previous or {}), "disable": True})
    try:
        yield
    finally:
        if previous is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = previous


class Uninterrupted:
    """Defers Ctrl-C to the end of the block. Threads other than the main one never get it."""

    def __init__(self) -> None:
        self.over = False
        self.pending: tuple[int, FrameType | None] | None = None
        self.handler: _Deferred | None = None

    def __enter__(self) -> Uninterrupted:
        """Defer the signal."""
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(previous):
            self.handler = _Deferred(weakref.ref(self), previous)
            signal.signal(signal.SIGINT, self.handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it through again."""
        self.over = True
        handler = self.handler
        if handler is None:
            return
        if id(signal.getsignal(signal.SIGINT)) == id(handler):
            signal.signal(signal.SIGINT, handler.previous)
        if self.pending is not None:
            handler.previous(*self.pending)


class _Deferred:
    """Handler that takes note of the signal while its block lasts, and hands it on as soon as the block is gone."""

    def __init__(self, block: weakref.ref[Uninterrupted], previous: Callable[[int, FrameType | None], object]) -> None:
        self.block, self.previous = block, previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note, or hand on."""
        block = self.block()
        if block is None or block.over:
            self.previous(number, frame)
        else:
            block.pending = (number, frame)
