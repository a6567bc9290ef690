"""Stable Diffusion 1.x and 2.x with erasure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusionPipeline

from erasure.interop.pipelines import progress_bar_config
from erasure.pipelines.localization import Localization
from erasure.pipelines.mixin import ErasureMixin
from erasure.pipelines.pictures import Pictures
from erasure.pipelines.removal import StableDiffusionObjectRemovalPipeline


class StableDiffusionErasurePipeline(ErasureMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` plus the methods of `ErasureMixin`; calls, components and files are the stock ones.

    Example:
        >>> pipe = StableDiffusionErasurePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe.erase("Van Gogh", strategy="uce")
        >>> pipe("a starry night in the style of Van Gogh").images[0]
    """

    def localize(
        self,
        prompt_or_image: str | Pictures,
        words: str | Sequence[str],
        *,
        others: str | Sequence[str] = (),
        generator: torch.Generator | None = None,
        call: Mapping[str, object] | None = None,
        **options: object,
    ) -> Localization:
        """Find what words name: in an image, or in one that is drawn from a prompt first.

        Args:
            prompt_or_image: A prompt, or images as `LocalizationMixin.localize` takes them.
            words: What to find.
            others: What else is there.
            generator: Of the noise of finding; seed 0 when left out.
            call: Arguments of drawing: steps, guidance, its own generator.
            **options: See `LocalizationSettings`.

        Returns:
            Masks, scores, and the images that were looked at.
        """
        image: Pictures
        if isinstance(prompt_or_image, str):
            image = self(prompt_or_image, output_type="pil", **(call or {})).images
        else:
            image = prompt_or_image
        finder = StableDiffusionObjectRemovalPipeline.from_pipe(self)
        finder.set_progress_bar_config(**progress_bar_config(self))
        return finder.localize(image, words, others=others, generator=generator, **options)
