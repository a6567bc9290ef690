"""Generate samples in batches, each with its own noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval.rows import Record
from erasure.eval.samples import Sample, denoiser, initial_noise, latent_shape
from erasure.interop import scopes


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Split into batches of equal settings, in the order in which the settings first appear."""
    groups: dict[tuple[int, float, int, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.settings, []).append(sample)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def negative_prompts(batch: Sequence[Sample]) -> list[str] | None:
    """The negative prompts of a batch; none at all where all are empty: that is another input to some models.

    SDXL is told zeros where there is no negative prompt, and the encoding of "" where it is empty.
    """
    texts = [sample.negative_prompt for sample in batch]
    return texts if any(texts) else None


def generate(
    pipe: DiffusionPipeline,
    samples: Sequence[Sample],
    batch_size: int = 16,
    more: Callable[[list[Sample]], Record] = lambda batch: {},
) -> Iterator[tuple[list[Sample], list[Image.Image]]]:
    """Yield `(samples, images)` batch by batch.

    Args:
        pipe: A text-to-image pipeline of diffusers whose call takes `latents`.
        samples: What to generate.
        batch_size: Images per call of the pipeline.
        more: Further arguments of the call for a batch.

    Raises:
        EvaluationError: The pipeline has a safety checker, whose black images would pass for erased ones.
        UnsupportedModelError: The pipeline does not take a latent image as its noise.
    """
    if getattr(pipe, "safety_checker", None) is not None:
        raise EvaluationError(
            "the pipeline has a safety checker, whose black images would count as erased: load the pipeline with "
            "safety_checker=None to measure the model itself"
        )
    for batch in batches(samples, batch_size):
        drawn = [initial_noise(sample, latent_shape(pipe, sample)) for sample in batch]
        steps, guidance, height, width = batch[0].settings
        with torch.no_grad(), scopes.quiet(pipe):
            images = pipe(
                prompt=[sample.prompt for sample in batch],
                negative_prompt=negative_prompts(batch),
                latents=torch.stack([noise for noise, _ in drawn]).to(pipe.device, denoiser(pipe).dtype),
                # Ancestral samplers go on drawing from the generator of each sample.
                generator=[generator for _, generator in drawn],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="pil",
                **more(batch),
            ).images
        yield batch, images
