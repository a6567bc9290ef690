"""Drop-in diffusers pipelines: the stock classes plus the erasure methods."""

from __future__ import annotations

from typing import Literal

from diffusers import (
    ChromaPipeline,
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from erasure.backbones import known_of
from erasure.errors import UnsupportedModelError
from erasure.interop.pipelines import register_auto_pipeline
from erasure.pipelines.a_star import StableDiffusionAStarPipeline, StableDiffusionXLAStarPipeline
from erasure.pipelines.flow_matching import (
    ChromaErasurePipeline,
    FluxErasurePipeline,
    StableDiffusion3ErasurePipeline,
)
from erasure.pipelines.joint_removal import FluxObjectRemovalPipeline, StableDiffusion3ObjectRemovalPipeline
from erasure.pipelines.mixin import ATTACHED_FILE, ErasureMixin, base_of
from erasure.pipelines.removal import StableDiffusionObjectRemovalPipeline, StableDiffusionXLObjectRemovalPipeline
from erasure.pipelines.stable_diffusion import StableDiffusionErasurePipeline, StableDiffusionXLErasurePipeline

Task = Literal["text-to-image", "object-removal", "composition"]
PIPELINES: dict[Task, dict[str, type[DiffusionPipeline]]] = {
    "text-to-image": {
        "StableDiffusionPipeline": StableDiffusionErasurePipeline,
        "StableDiffusionErasurePipeline": StableDiffusionErasurePipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLErasurePipeline,
        "StableDiffusionXLErasurePipeline": StableDiffusionXLErasurePipeline,
        "StableDiffusion3Pipeline": StableDiffusion3ErasurePipeline,
        "StableDiffusion3ErasurePipeline": StableDiffusion3ErasurePipeline,
        "FluxPipeline": FluxErasurePipeline,
        "FluxErasurePipeline": FluxErasurePipeline,
        "ChromaPipeline": ChromaErasurePipeline,
        "ChromaErasurePipeline": ChromaErasurePipeline,
    },
    "object-removal": {
        "StableDiffusionPipeline": StableDiffusionObjectRemovalPipeline,
        "StableDiffusionErasurePipeline": StableDiffusionObjectRemovalPipeline,
        "StableDiffusionInpaintPipeline": StableDiffusionObjectRemovalPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLObjectRemovalPipeline,
        "StableDiffusionXLErasurePipeline": StableDiffusionXLObjectRemovalPipeline,
        "StableDiffusionXLInpaintPipeline": StableDiffusionXLObjectRemovalPipeline,
        "StableDiffusion3Pipeline": StableDiffusion3ObjectRemovalPipeline,
        "StableDiffusion3ErasurePipeline": StableDiffusion3ObjectRemovalPipeline,
        "StableDiffusion3InpaintPipeline": StableDiffusion3ObjectRemovalPipeline,
        "FluxPipeline": FluxObjectRemovalPipeline,
        "FluxErasurePipeline": FluxObjectRemovalPipeline,
        "FluxInpaintPipeline": FluxObjectRemovalPipeline,
    },
    "composition": {
        "StableDiffusionPipeline": StableDiffusionAStarPipeline,
        "StableDiffusionErasurePipeline": StableDiffusionAStarPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLAStarPipeline,
        "StableDiffusionXLErasurePipeline": StableDiffusionXLAStarPipeline,
    },
}
"""Drop-in class of each stock class, by task."""

register_auto_pipeline(StableDiffusionErasurePipeline, StableDiffusionPipeline)
register_auto_pipeline(StableDiffusionXLErasurePipeline, StableDiffusionXLPipeline)
register_auto_pipeline(StableDiffusion3ErasurePipeline, StableDiffusion3Pipeline)
register_auto_pipeline(FluxErasurePipeline, FluxPipeline)
register_auto_pipeline(ChromaErasurePipeline, ChromaPipeline)


def pipeline_class(stock: str, task: Task = "text-to-image") -> type[DiffusionPipeline]:
    """Find the drop-in class of a stock class, by its name.

    Raises:
        UnsupportedModelError: There is no drop-in class for it.
    """
    known = PIPELINES[task]
    if stock not in known:
        raise UnsupportedModelError(
            f"no drop-in for {stock or 'a folder without a pipeline class'} that does {task}; supported: "
            f"{', '.join(known)}{known_of(stock)}"
        )
    return known[stock]


def drop_in(pipe: object, task: Task) -> type[DiffusionPipeline]:
    """Find the drop-in class for a task on the components of a pipeline, which may be a user's subclass.

    Raises:
        UnsupportedModelError: There is none for its class or for any of its base classes.
    """
    known = PIPELINES[task]
    names = [kind.__name__ for kind in type(pipe).__mro__]
    return pipeline_class(next((name for name in names if name in known), names[0]), task)


__all__ = [
    "ATTACHED_FILE",
    "PIPELINES",
    "ChromaErasurePipeline",
    "ErasureMixin",
    "FluxErasurePipeline",
    "FluxObjectRemovalPipeline",
    "StableDiffusion3ErasurePipeline",
    "StableDiffusion3ObjectRemovalPipeline",
    "StableDiffusionAStarPipeline",
    "StableDiffusionErasurePipeline",
    "StableDiffusionObjectRemovalPipeline",
    "StableDiffusionXLAStarPipeline",
    "StableDiffusionXLErasurePipeline",
    "StableDiffusionXLObjectRemovalPipeline",
    "Task",
    "base_of",
    "drop_in",
    "pipeline_class",
]
