"""Finding what words name, in what a text-to-image pipeline draws or is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from erasure.interop.protocols import as_pipeline
from erasure.pipelines.localization import Localization, LocalizationMixin
from erasure.pipelines.mixin import ErasureMixin
from erasure.pipelines.pictures import Pictures


class FindingErasureMixin(LocalizationMixin, ErasureMixin):
    """Put ahead of a stock text-to-image pipeline: erasure, and finding what words name."""

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
            image = as_pipeline(self)(prompt_or_image, output_type="pil", **(call or {})).images
        else:
            image = prompt_or_image
        return super().localize(image, words, others=others, generator=generator, **options)
