"""Stable Diffusion 1.x and 2.x with erasure."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from erasure.pipelines.mixin import ErasureMixin


class StableDiffusionErasurePipeline(ErasureMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` plus the methods of `ErasureMixin`; calls, components and files are the stock ones.

    Example:
        >>> pipe = StableDiffusionErasurePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe.erase("Van Gogh", strategy="uce")
        >>> pipe("a starry night in the style of Van Gogh").images[0]
    """
