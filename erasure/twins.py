"""Other pipeline objects on the weights of one: without its erasures, or without what its user has put on it besides.

What is done with a twin reaches neither the pipeline nor threads that draw with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from diffusers import DiffusionPipeline

from erasure.backbones import backbone_for
from erasure.interop import adapters, paths
from erasure.interop.pipelines import components_of, twin, without_free_u
from erasure.state import ComponentState

PREFIX = "erasure"
"""What the names of our hooks begin with, and our attributes of modules behind an underscore."""


def states_of(pipe: DiffusionPipeline) -> dict[str, ComponentState]:
    """What is attached to the components of a pipeline, by name of the component."""
    found = {name: ComponentState.of(module) for name, module in components_of(pipe).items()}
    return {name: state for name, state in found.items() if state is not None}


def stock_of(pipe: DiffusionPipeline, *, without_adapters: bool, latents_only: bool = False) -> DiffusionPipeline:
    """A twin without erasures; nothing of the pipeline may be offloaded.

    Args:
        pipe: The pipeline.
        without_adapters: Leave out what its user has put on it too: LoRA adapters and FreeU.
        latents_only: It encodes prompts and denoises, and has everything else from the pipeline itself: cheaper.
    """
    modules, states = components_of(pipe), states_of(pipe)
    originals = {
        name: {path: state.record.written.edited(modules[name], path, []) for path in state.record.written.originals}
        for name, state in states.items()
    }
    parts = _denoising(pipe) if latents_only else None
    made = twin(pipe, originals, states.values(), prefix=PREFIX, without_adapters=without_adapters, components=parts)
    return without_free_u(made) if without_adapters else made


def apart_of(pipe: DiffusionPipeline, edited: Mapping[str, Collection[str]]) -> DiffusionPipeline:
    """A twin with tensors of its own for some parameters: an erasure that is attached to it reaches no other.

    Args:
        pipe: The pipeline; nothing of it may be offloaded.
        edited: Canonical paths of those parameters, by component.
    """
    modules = components_of(pipe)
    own = {name: {path: paths.parameter(modules[name], path) for path in each} for name, each in edited.items()}
    return twin(pipe, own, (), prefix=None, without_adapters=False)


def erased_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A twin with the erasures; nothing of the pipeline may be offloaded."""
    return twin(pipe, {}, (), prefix=None, without_adapters=False)


def bare_of(pipe: DiffusionPipeline) -> DiffusionPipeline | None:
    """The pipeline with its erasures but without its user's LoRA adapters and FreeU: itself, where it has none.

    It encodes prompts and denoises only. There is none where adapters are fused into the weights.
    """
    modules = components_of(pipe).values()
    if any(adapters.merged_names(module) for module in modules):
        return None
    if any(adapters.names_in_force(module) or paths.has_free_u(module) for module in modules):
        states, parts = states_of(pipe).values(), _denoising(pipe)
        return without_free_u(twin(pipe, {}, states, prefix=None, without_adapters=True, components=parts))
    return pipe


def _denoising(pipe: DiffusionPipeline) -> set[str]:
    """Names of the components that encode prompts and denoise."""
    backbone = backbone_for(pipe)
    return {backbone.denoiser_component, *(tower.component for tower in backbone.towers)}
