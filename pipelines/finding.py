"""Finding the things that words name in given or generated images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from erasure.interop.protocols import as_pipeline
from erasure.pipelines.localization import Localization, LocalizationMixin
from erasure.pipelines.mixin import ErasureMixin
from erasure.pipelines.pictures import Pictures


class FindingErasureMixin(LocalizationMixin, ErasureMixin):
    """Mixin for a stock text-to-image pipeline class: erasure, and finding the things that words name."""

    def localize(  # type: ignore[override]
        self,
        prompt_or_image: str | Pictures,
        words: str | Sequence[str],
        *,
        others: str | Sequence[str] = (),
        generator: torch.Generator | None = None,
        call: Mapping[str, object] | None = None,
        **options: object,
    ) -> Localization:
        """Find the things that words name in images, or in an image that is first drawn from a prompt.

        Args:
            prompt_or_image: A prompt, or images as `LocalizationMixin.localize` takes them.
            words: Names of the things to find.
            others: Names of other things in the image.
            generator: Random generator of the noise for finding; seed 0 when left out.
            call: Arguments of the call that draws: steps, guidance, its own generator.
            **options: See `LocalizationSettings`.

        Returns:
            Masks, scores, and the searched images.
        """
        image: Pictures
        if isinstance(prompt_or_image, str):
            image = as_pipeline(self)(prompt_or_image, output_type="pil", **(call or {})).images
        else:
            image = prompt_or_image
        return super().localize(image, words, others=others, generator=generator, **options)
