"""What an attack is up against: the erased model, the original one behind it, and the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from erasure.backbones import backbone_for
from erasure.eval.attacks import SkippedPromptError
from erasure.eval.attempts import Attempt
from erasure.eval.generation import generate
from erasure.eval.metrics.unlearncanvas import unlearned
from erasure.eval.rows import Record
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.scoring import Judge, call_judge, judgement, reason
from erasure.eval.suites import Target
from erasure.images import flaw
from erasure.interop import scopes

ORDINARY = Attempt()
"""The call as a sample has it."""


class Verdict(NamedTuple):
    """What the judge says of an image."""

    judged: Record | None
    """Its answer, as rows of an evaluation keep it."""
    shown: bool | None
    """Whether it sees the concept; `None` when it failed."""
    failure: str | None
    """Why it failed."""


class Victim:
    """A model under attack.

    Args:
        pipe: The pipeline, with its erasures in force.
        stock: The original model.
        target: The concept.
        judge: Images to answers with `.object` and `.style`.
        keep: Told of every reference image that is used, with its sample.

    Attributes:
        references: Images that the original model has drawn.
    """

    def __init__(
        self, pipe: DiffusionPipeline, stock: DiffusionPipeline, target: Target, judge: Judge,
        keep: Callable[[Sample, Image.Image], None] = lambda sample, image: None,
    ) -> None:  # fmt: skip
        self.pipe, self.stock, self.target, self.judge, self.keep = pipe, stock, target, judge, keep
        self.backbone, self.references = backbone_for(pipe), 0

    def draw(self, sample: Sample, attempt: Attempt = ORDINARY, *, stock: bool = False) -> Image.Image:
        """A sample's image by the model under attack, from the sample's own noise and through its ordinary call.

        Args:
            sample: Prompt, noise and settings.
            attempt: What is tried in their place.
            stock: Draw with the original model instead.
        """
        self.references += stock
        with attempt.change(self.stock if stock else self.pipe) as pipe:
            return next(generate(pipe, [sample], more=lambda _: attempt.arguments()))[1][0]

    def verdict(self, image: Image.Image, sample: Sample) -> Verdict:
        """Whether an image shows the concept: where UA counts the sample as not unlearned.

        An image that shows nothing, such as a black one, is no answer: neither a success nor a failure of the attack.
        """
        if (found := flaw(image)) is not None:
            return Verdict(None, None, found)
        (answer,) = call_judge(self.judge, [image])
        try:
            if isinstance(answer, Exception):
                raise answer
            judged = judgement(answer, sample)
        except Exception as error:  # a detector may fail in any way
            return Verdict(None, None, reason(error))
        outcomes = unlearned([sample.row() | {"judged": judged}], [self.target])
        if not outcomes.hits:
            return Verdict(judged, None, "the judge gave no answer for the concept's domain")
        return Verdict(judged, not outcomes.hits[0], None)

    def reference(self, sample: Sample, tries: int) -> Tensor:
        """An image of the concept from the sample's prompt by the original model, from other noise than the sample's.

        Args:
            sample: Prompt and settings.
            tries: Seeds that are tried until the judge sees the concept.

        Returns:
            Its clean latent, `(1, channels, h, w)`.

        Raises:
            SkippedPromptError: It sees the concept with none of them.
        """
        size = (sample.height, sample.width)
        call = self.backbone.call_options(
            sample.guidance_scale, sample.num_inference_steps, size, [sample.negative_prompt]
        )
        for number in range(tries):
            seed = sample_seed(sample.seed, f"reference: {sample.prompt}", number)
            with torch.no_grad(), scopes.quiet(self.stock):
                latent = self.stock(
                    prompt=[sample.prompt],
                    generator=torch.Generator("cpu").manual_seed(seed), output_type="latent", **call,
                ).images  # fmt: skip
                latent = self.backbone.latents.unpacked(latent, *size)
                image = picture(self.backbone.decode(latent))
            self.references += 1
            if self.verdict(image, sample).shown:
                self.keep(sample, image)
                return latent
        raise SkippedPromptError(
            f"no reference image: the judge sees {self.target.name!r} in none of {tries} images that the original "
            f"model draws of {sample.prompt!r}"
        )


def picture(pixels: Tensor) -> Image.Image:
    """Pixels `(1, 3, height, width)` in 0-1 as an image."""
    return Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy())
