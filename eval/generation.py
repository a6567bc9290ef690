"""Generate samples in batches, each with its own noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval.beside import Clock
from erasure.eval.rows import Record
from erasure.eval.samples import Sample, drawing, initial_noise
from erasure.interop import scopes


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Split samples into batches of equal settings, in the order in which the settings first appear."""
    groups: dict[tuple[int, float, int, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.settings, []).append(sample)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def generate(
    pipe: DiffusionPipeline,
    samples: Sequence[Sample],
    batch_size: int = 16,
    more: Callable[[list[Sample]], Record] = lambda batch: {},
    clock: Clock | None = None,
) -> Iterator[tuple[list[Sample], list[Image.Image]]]:
    """Yield `(samples, images)` batch by batch.

    Args:
        pipe: A text-to-image pipeline of diffusers whose call takes `latents`.
        samples: What to generate.
        batch_size: Images per call of the pipeline.
        more: Arguments of the call for a batch, further ones or in the place of these; `None` leaves one out.
        clock: Told of the steps of every call.

    Raises:
        EvaluationError: The pipeline has a safety checker, whose black images would pass for erased ones.
        UnsupportedModelError: The model is of no supported family, or paints into pictures.
        OptionError: A size that the model cannot draw, or a negative prompt that it would not read.
    """
    if getattr(pipe, "safety_checker", None) is not None:
        raise EvaluationError(
            "the pipeline has a safety checker, whose black images would count as erased: load the pipeline with "
            "safety_checker=None to measure the model itself"
        )
    for batch in batches(samples, batch_size):
        steps, guidance, height, width = batch[0].settings
        backbone = drawing(pipe)
        drawn = [initial_noise(sample, backbone.latents.shape(height, width)) for sample in batch]
        noise = torch.stack([noise for noise, _ in drawn]).to(pipe.device, backbone.dtype)
        negative = [sample.negative_prompt for sample in batch]
        call = {
            "prompt": [sample.prompt for sample in batch],
            "latents": backbone.latents.packed(noise),
            # Ancestral samplers go on drawing from the generator of each sample.
            "generator": [generator for _, generator in drawn],
            "output_type": "pil",
            **backbone.call_options(guidance, steps, (height, width), negative),
            **({} if clock is None else clock.call_arguments(pipe)),
            **more(batch),
        }
        with torch.no_grad(), scopes.quiet(pipe):
            images = pipe(**{name: given for name, given in call.items() if given is not None}).images
        if clock is not None:
            clock.called()
        yield batch, images


def timed(
    drawn: Iterator[tuple[list[Sample], list[Image.Image]]], clock: Clock
) -> Iterator[tuple[list[Sample], list[Image.Image], float]]:
    """Yield batches of samples and images, with the drawing time of each image in seconds.

    Args:
        drawn: Batches, which are drawn when they are asked for.
        clock: What counts the seconds of all of them.
    """
    while True:
        start = time.perf_counter()
        try:
            batch, images = next(drawn)
        except StopIteration:
            return
        seconds = time.perf_counter() - start
        clock.drawing += seconds
        yield batch, images, seconds / len(batch)
