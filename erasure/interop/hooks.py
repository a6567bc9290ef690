"""Hooks of diffusers on modules, which survive `torch.compile` and offloading, unlike torch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import HookRegistry
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from torch import nn

from erasure.interop import patches

__all__ = [
    "ModelHook",
    "SurroundingHook",
    "drops_rows",
    "find_hook",
    "hooked",
    "is_stateful",
    "register_hook",
    "relink",
    "remove_caches",
    "remove_hook",
    "remove_hooks",
    "reset_caches",
    "runs_hook",
]


class SurroundingHook(ModelHook):
    """A hook that calls the module's forward itself.

    diffusers' own mechanism, `new_forward`, stops working when a hook beneath it is removed.
    """

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> object:
        """Call the module's `forward` with the same or other arguments, and return its output or another."""
        raise NotImplementedError


class _HookedForward:
    """The forward of a hooked module: an object, because deep copies would share `HookRegistry`'s closure."""

    def __init__(self, hook: ModelHook) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        """The hook's part before, the forward that was there, the hook's part after."""
        chain = self.hook.fn_ref
        args, kwargs = chain.pre_forward(module, *args, **kwargs)
        if isinstance(self.hook, SurroundingHook):
            return chain.post_forward(module, self.hook.around(chain.forward, *args, **kwargs))
        return chain.post_forward(module, chain.forward(*args, **kwargs))


def register_hook(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a diffusers hook so that a deep copy of the module runs the copy, not the original."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    forward = functools.partial(_HookedForward(hook), module)
    module.forward = functools.update_wrapper(forward, hook.fn_ref.forward)


def find_hook(module: nn.Module | None, name: str) -> ModelHook | None:
    """A hook that is registered on a module, if it is."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def remove_hook(module: nn.Module, name: str) -> None:
    """Remove a hook from a module, but not from its children; do nothing where there is none."""
    if find_hook(module, name) is None:
        return
    registry = HookRegistry.check_if_exists_or_initialize(module)
    index = registry._hook_order.index(name)
    taken = registry._fn_refs[index]
    beneath = taken.original_forward or taken.forward
    above = next(iter(registry._fn_refs[index + 1 :]), None)
    own = None if above is None or above.original_forward is None else above.forward
    registry.remove_hook(name, recurse=False)
    if above is not None and own is not None:
        # diffusers would leave a `new_forward` above out, and call the hook that is gone.
        above.original_forward, above.forward = beneath, own


@contextmanager
def hooked(module: nn.Module, hook: ModelHook, name: str) -> Iterator[ModelHook]:
    """Put a hook on a module inside of the block; remove it afterwards, after an error too."""
    register_hook(module, hook, name)
    try:
        yield hook
    finally:
        remove_hook(module, name)


def reset_caches(*components: nn.Module) -> None:
    """Reset step caches (`enable_cache`) and other stateful hooks of components.

    Caches of a denoiser depend on the text encoders' outputs, so a change of these needs a reset too.
    """
    for component in components:
        registry = getattr(component, "_diffusers_hook", None)
        if registry is not None or any(hasattr(part, "_diffusers_hook") for part in component.modules()):
            HookRegistry.check_if_exists_or_initialize(component).reset_stateful_hooks(recurse=True)


def is_stateful(component: nn.Module) -> bool:
    """Whether a step cache or another hook that remembers earlier passes is on a component."""
    registries = (getattr(part, "_diffusers_hook", None) for part in component.modules())
    return patches.has_deep_cache(component) or any(
        hook._is_stateful for registry in registries if registry for hook in registry.hooks.values()
    )


def drops_rows(denoiser: nn.Module) -> bool:
    """Whether FasterCache is on a denoiser, which leaves out half of the rows of some passes."""
    return find_hook(denoiser, "faster_cache_denoiser") is not None


def relink(component: nn.Module) -> None:
    """Make a deep copy of a network run its own hooks, because diffusers' wrappers of forwards run the original's.

    Modules that accelerate has put a hook on stay as they are: what it puts around a forward lies between.
    """
    for part in component.modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is None or not registry.hooks or hasattr(part, "_hf_hook"):
            continue
        chain = list(zip(registry._hook_order, registry._fn_refs, strict=True))
        forward = chain[0][1].original_forward or chain[0][1].forward
        for name, step in chain:
            hook = registry.hooks[name]
            step.forward = forward
            if hasattr(hook, "new_forward"):
                step.original_forward, step.forward = forward, functools.partial(hook.new_forward, part)
            forward = functools.update_wrapper(functools.partial(_HookedForward(hook), part), forward)
        part.forward = forward


def remove_caches(component: nn.Module) -> None:
    """Remove step caches (`enable_cache`) from a network, so that every pass computes everything."""
    for part in component.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for name, hook in list(registry.hooks.items()) if registry else ():
            if hook._is_stateful or any(isinstance(value, StateManager) for value in vars(hook).values()):
                remove_hook(part, name)
    if getattr(component, "is_cache_enabled", False):
        component._cache_config = None  # type: ignore[assignment]


def remove_hooks(component: nn.Module, prefix: str) -> None:
    """Remove all hooks from a component and its children whose name begins with a prefix."""
    for part in component.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for name in [name for name in registry.hooks if name.startswith(prefix)] if registry else ():
            remove_hook(part, name)


def runs_hook(module: nn.Module, name: str) -> bool:
    """Whether a hook is registered on a module and stands in the chain that its `forward` runs now."""
    hook = find_hook(module, name)
    step: Callable[..., object] | None = module.forward
    while hook is not None and step is not None:
        if isinstance(step, functools.partial) and isinstance(step.func, _HookedForward):
            if step.func.hook is hook:
                return True
            chain = step.func.hook.fn_ref
            step = chain.original_forward or chain.forward
        else:
            # What diffusers and accelerate put around a forward names it so.
            step = getattr(step, "__wrapped__", None)
    return False
