"""Drop-in diffusers pipelines: the stock classes plus the erasure methods."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from erasure.errors import UnsupportedModelError
from erasure.pipelines.mixin import ErasureMixin
from erasure.pipelines.stable_diffusion import StableDiffusionErasurePipeline

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "StableDiffusionPipeline": StableDiffusionErasurePipeline,
    "StableDiffusionErasurePipeline": StableDiffusionErasurePipeline,
}
"""Which class stands in for which stock class."""


def pipeline_class(stock: str) -> type[DiffusionPipeline]:
    """The drop-in for a stock class's name.

    Raises:
        UnsupportedModelError: There is none yet.
    """
    if stock not in PIPELINES:
        raise UnsupportedModelError(f"no drop-in for {stock or 'a folder without a pipeline class'}; supported: {', '.join(PIPELINES)}")
    return PIPELINES[stock]


__all__ = ["PIPELINES", "ErasureMixin", "StableDiffusionErasurePipeline", "pipeline_class"]
