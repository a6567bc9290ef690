"""Stable Diffusion 3, Flux and Chroma with erasure."""

from __future__ import annotations

from diffusers import ChromaPipeline, FluxPipeline, StableDiffusion3Pipeline

from erasure.pipelines.mixin import ErasureMixin


class FluxErasurePipeline(ErasureMixin, FluxPipeline):
    """`FluxPipeline` plus the methods of `ErasureMixin`; calls, components and files are the stock ones.

    Example:
        >>> pipe = FluxErasurePipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
        >>> pipe.erase("Van Gogh", strategy="uce")
    """


class StableDiffusion3ErasurePipeline(ErasureMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` plus the methods of `ErasureMixin`, with its T5 or without.

    Example:
        >>> pipe = StableDiffusion3ErasurePipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
        >>> pipe.erase("Van Gogh", strategy="uce")
    """


class ChromaErasurePipeline(ErasureMixin, ChromaPipeline):
    """`ChromaPipeline` plus the methods of `ErasureMixin`, as `FluxErasurePipeline` has them.

    Example:
        >>> pipe = ChromaErasurePipeline.from_pretrained("lodestones/Chroma1-HD")
        >>> pipe.erase("Van Gogh", strategy="uce")
    """
