"""Drop-in diffusers pipelines: the stock classes plus the erasure methods."""

from __future__ import annotations

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from erasure.errors import UnsupportedModelError
from erasure.modules import register_auto_pipeline
from erasure.pipelines.mixin import ATTACHED_FILE, ErasureMixin
from erasure.pipelines.stable_diffusion import StableDiffusionErasurePipeline

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "StableDiffusionPipeline": StableDiffusionErasurePipeline,
    "StableDiffusionErasurePipeline": StableDiffusionErasurePipeline,
}
"""Which class stands in for which stock class."""

register_auto_pipeline(StableDiffusionErasurePipeline, StableDiffusionPipeline)


def pipeline_class(stock: str) -> type[DiffusionPipeline]:
    """The drop-in for a stock class's name.

    Raises:
        UnsupportedModelError: There is none yet.
    """
    if stock not in PIPELINES:
        raise UnsupportedModelError(
            f"no drop-in for {stock or 'a folder without a pipeline class'}; supported: {', '.join(PIPELINES)}"
        )
    return PIPELINES[stock]


__all__ = ["ATTACHED_FILE", "PIPELINES", "ErasureMixin", "StableDiffusionErasurePipeline", "pipeline_class"]
