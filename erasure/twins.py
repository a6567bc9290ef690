"""Twins: other pipeline objects on the same weights, without erasures or without a user's additions.

Changes of a twin affect neither the pipeline nor threads that draw with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from diffusers import DiffusionPipeline

from erasure.backbones import backbone_for
from erasure.interop import adapters, paths
from erasure.interop.pipelines import components_of, twin, without_free_u
from erasure.state import ComponentState

PREFIX = "erasure"
"""Prefix of the names of our hooks, and, after an underscore, of our attributes on modules."""


def states_of(pipe: DiffusionPipeline) -> dict[str, ComponentState]:
    """Get the erasure states of a pipeline's components, by name of the component."""
    found = {name: ComponentState.of(module) for name, module in components_of(pipe).items()}
    return {name: state for name, state in found.items() if state is not None}


def stock_of(pipe: DiffusionPipeline, *, without_adapters: bool, latents_only: bool = False) -> DiffusionPipeline:
    """Make a twin without erasures; the pipeline must not be offloaded.

    Args:
        pipe: The pipeline.
        without_adapters: Leave out a user's LoRA adapters and FreeU too.
        latents_only: Copy only the components that encode prompts and denoise, which is cheaper; share all others.
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
    """Make a twin with its own tensors for some parameters: erasures attached to it have no effect on others.

    Args:
        pipe: The pipeline, which must not be offloaded.
        edited: Canonical paths of these parameters, by component.
    """
    modules = components_of(pipe)
    own = {name: {path: paths.parameter(modules[name], path) for path in each} for name, each in edited.items()}
    return twin(pipe, own, (), prefix=None, without_adapters=False)


def erased_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Make a twin with the erasures; the pipeline must not be offloaded."""
    return twin(pipe, {}, (), prefix=None, without_adapters=False)


def bare_of(pipe: DiffusionPipeline) -> DiffusionPipeline | None:
    """Give the pipeline with its erasures but without a user's LoRA adapters and FreeU: itself, where it has none.

    The result can only encode prompts and denoise. It is `None` where adapters are fused into the weights.
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
