"""Other pipeline objects on the weights of one: without its erasures, or without what its user has put on it besides.

What is done with a twin reaches neither the pipeline nor threads that draw with it.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from erasure.interop import adapters, paths
from erasure.interop.pipelines import components_of, twin, without_free_u
from erasure.state import ComponentState

PREFIX = "erasure"
"""What the names of our hooks begin with, and our attributes of modules behind an underscore."""


def states_of(pipe: DiffusionPipeline) -> dict[str, ComponentState]:
    """What is attached to the components of a pipeline, by name of the component."""
    found = {name: ComponentState.of(module) for name, module in components_of(pipe).items()}
    return {name: state for name, state in found.items() if state is not None}


def stock_of(pipe: DiffusionPipeline, *, without_adapters: bool) -> DiffusionPipeline:
    """A twin without erasures; nothing of the pipeline may be offloaded.

    Args:
        pipe: The pipeline.
        without_adapters: Leave out what its user has put on it too: LoRA adapters and FreeU.
    """
    modules, states = components_of(pipe), states_of(pipe)
    originals = {
        name: {path: state.record.written.edited(modules[name], path, []) for path in state.record.written.originals}
        for name, state in states.items()
    }
    made = twin(pipe, originals, states.values(), prefix=PREFIX, without_adapters=without_adapters)
    return without_free_u(made) if without_adapters else made


def erased_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A twin with the erasures; nothing of the pipeline may be offloaded."""
    return twin(pipe, {}, (), prefix=None, without_adapters=False)


def bare_of(pipe: DiffusionPipeline) -> DiffusionPipeline | None:
    """The pipeline with its erasures but without its user's LoRA adapters and FreeU: itself, where it has none.

    There is none where adapters are fused into the weights.
    """
    modules = components_of(pipe).values()
    if any(adapters.merged_names(module) for module in modules):
        return None
    if any(adapters.names_in_force(module) or paths.has_free_u(module) for module in modules):
        return without_free_u(twin(pipe, {}, states_of(pipe).values(), prefix=None, without_adapters=True))
    return pipe
