"""Stable Diffusion 1.x, 2.x and XL with erasure."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from erasure.pipelines.finding import FindingErasureMixin


class StableDiffusionErasurePipeline(FindingErasureMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` plus the methods of `FindingErasureMixin`; calls, parts and files are the stock ones.

    Example:
        >>> pipe = StableDiffusionErasurePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe.erase("Van Gogh", strategy="uce")
        >>> pipe("a starry night in the style of Van Gogh").images[0]
    """


class StableDiffusionXLErasurePipeline(FindingErasureMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` plus the same methods as `StableDiffusionErasurePipeline`.

    Example:
        >>> pipe = StableDiffusionXLErasurePipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.erase("Van Gogh", strategy="uce")
    """
