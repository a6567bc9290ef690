"""Stable Diffusion 3, Flux and Chroma with erasure."""

from __future__ import annotations

from diffusers import ChromaPipeline, FluxPipeline, StableDiffusion3Pipeline

from erasure.pipelines.finding import FindingErasureMixin


class FluxErasurePipeline(FindingErasureMixin, FluxPipeline):
    """`FluxPipeline` plus the methods of `FindingErasureMixin`; calls, components and files are the stock ones.

    Example:
        >>> pipe = FluxErasurePipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
        >>> pipe.erase("Van Gogh", strategy="uce")
    """


class StableDiffusion3ErasurePipeline(FindingErasureMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` plus the methods of `FindingErasureMixin`, with its T5 or without.

    Example:
        >>> pipe = StableDiffusion3ErasurePipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
        >>> pipe.erase("Van Gogh", strategy="uce")
    """


class ChromaErasurePipeline(FindingErasureMixin, ChromaPipeline):
    """`ChromaPipeline` plus the methods of `FindingErasureMixin`, as `FluxErasurePipeline` has them.

    Example:
        >>> pipe = ChromaErasurePipeline.from_pretrained("lodestones/Chroma1-HD")
        >>> pipe.erase("Van Gogh", strategy="uce")
    """
