"""Finding modules and parameters, and the private parts of diffusers, transformers and PEFT that are relied on.

Everything that reaches behind a public interface of those libraries is in this file: a change there costs one file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, HookRegistry
from diffusers.hooks import ModelHook
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from erasure.errors import NoMatchingModuleError

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def transformer_root(module: nn.Module) -> nn.Module:
    """Where the blocks of a text encoder hang: `CLIPTextModelWithProjection` nests them, `CLIPTextModel` does not."""
    inner = getattr(module, "text_model", None)
    return inner if isinstance(inner, nn.Module) else module


def token_entry(root: nn.Module) -> nn.Module:
    """What a text encoder hands its token ids to: CLIP's `embeddings`, T5's `encoder.embed_tokens`."""
    found = getattr(root, "embeddings", None)
    return found if isinstance(found, nn.Module) else root.get_submodule("encoder.embed_tokens")


def token_table(root: nn.Module) -> nn.Embedding:
    """The embedding of a text encoder's tokens."""
    entry = token_entry(root)
    found = getattr(entry, "token_embedding", entry)
    assert isinstance(found, nn.Embedding)
    return found


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside the wrapper that `torch.compile` returns."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside any PEFT wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def canonical_parameters(component: nn.Module) -> dict[str, str]:
    """The path now, by canonical path, of every parameter of a text encoder's root but PEFT's own."""
    root = transformer_root(component)
    names = [name for name, _ in root.named_parameters() if ".lora_" not in name]
    return {name.replace(".base_layer.", "."): name for name in names}


def parameter(component: nn.Module, path: str) -> Tensor:
    """A parameter by canonical path: no `text_model.` prefix, PEFT wrappers looked through.

    Raises:
        AttributeError: There is none.
    """
    owner, name = path.rsplit(".", 1)
    module = base_layer(transformer_root(component).get_submodule(owner))
    found = getattr(module, name, None)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{type(module).__name__} at {owner!r} has no parameter {name!r}")
    return found


def layer(component: nn.Module, path: str) -> nn.Module:
    """A module by canonical path, PEFT wrappers looked through."""
    return base_layer(transformer_root(component).get_submodule(path))


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


def require_block(component: nn.Module, path: str, name: str) -> nn.Module:
    """A block of a text encoder by path.

    Raises:
        NoMatchingModuleError: There is none.
    """
    try:
        return transformer_root(component).get_submodule(path)
    except AttributeError:
        raise NoMatchingModuleError(f"{name} has no {path!r}: the erasure was made for another architecture") from None


def is_plain(tensor: Tensor) -> bool:
    """Whether a weight is an ordinary floating-point tensor, not quantised and not offloaded to nowhere."""
    ordinary = type(tensor) in (nn.Parameter, Tensor) and type(tensor.data) is Tensor
    return ordinary and tensor.dtype in PLAIN_DTYPES and tensor.device.type != "meta"


def is_fused(component: nn.Module, path: str) -> bool:
    """Whether the attention module at a path runs with fused query-key-value projections."""
    try:
        attention = transformer_root(component).get_submodule(path)
    except AttributeError:
        return False
    if isinstance(attention, Attention):
        # Unfusing puts the processor back but leaves `fused_projections` set.
        return type(attention.processor).__name__.startswith("Fused")
    return bool(getattr(attention, "fused_projections", False))


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


class _HookedForward:
    """What a hooked module runs. An object where `HookRegistry` has a closure, which a deep copy would share."""

    def __init__(self, hook: ModelHook) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The hook's part before, the forward that was there, the hook's part after."""
        chain = self.hook.fn_ref
        args, kwargs = chain.pre_forward(module, *args, **kwargs)
        return chain.post_forward(module, chain.forward(*args, **kwargs))


def register_hook(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a diffusers hook so that a deep copy of the module runs the copy, not the original."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    forward = functools.partial(_HookedForward(hook), module)
    module.forward = functools.update_wrapper(forward, hook.fn_ref.forward)  # type: ignore[method-assign]


def find_hook(module: nn.Module | None, name: str) -> ModelHook | None:
    """A hook that is registered on a module, if it is."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def register_auto_pipeline(pipeline: type[DiffusionPipeline], stock: type[DiffusionPipeline]) -> None:
    """Let `AutoPipelineFor...from_pipe` know a drop-in: it goes by class name and has no public way to add one."""
    from diffusers.pipelines import auto_pipeline

    model = auto_pipeline._get_model(stock.__name__)
    for mapping in auto_pipeline.SUPPORTED_TASKS_MAPPINGS:
        if model in mapping:
            mapping.setdefault(f"{model}-erasure", pipeline if mapping[model] is stock else mapping[model])


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
