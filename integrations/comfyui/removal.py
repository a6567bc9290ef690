"""Removing objects from an IMAGE with a pipeline of this package, on the device that ComfyUI draws on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import erasure
from erasure.errors import MaskError, OptionError
from erasure.masks import read_masks

from .pictures import image_of, masks_of, pixels_of, words_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Remover:
    """The pipeline that was used last, ready on the CPU."""

    def __init__(self) -> None:
        self.source: str | None = None
        self.pipe: DiffusionPipeline | None = None

    def of(self, source: str, device: torch.device) -> DiffusionPipeline:
        """The pipeline of a model, in the precision that suits a device.

        Raises:
            ErasureError: There is no such model, or it removes nothing.
        """
        if self.pipe is None or self.source != source:
            self.pipe = None
            self.pipe = erasure.load_pipeline(source, task="object-removal", device=device)
            self.pipe.set_progress_bar_config(disable=True)
            self.source = source
        return self.pipe


def removed(
    remover: Remover, source: str, image: Tensor, mask: Tensor | None, words: str, others: str, prompt: str, seed: int,
    steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take objects out of pictures.

    Args:
        remover: Holds the pipeline.
        source: The model; see `erasure.load_pipeline`.
        image: An IMAGE.
        mask: A MASK of what goes, one for all pictures or one for each.
        words: Without a mask: what goes, found by the model; with commas between several.
        others: What else is in the picture and stays.
        prompt: What should be in its place; background where it is empty.
        seed: Of the noise of the first picture; the others' follow.
        steps: Denoising steps; the model's own number where 0.

    Returns:
        An IMAGE of the same size, and the MASK of what was removed.

    Raises:
        MaskError: Neither mask nor words, both, an IMAGE or MASK that is none, or words that are not found.
        OptionError: Fewer steps than none, or a seed of more than 64 bits.
        ErasureError: The model does not serve.
    """
    from comfy import model_management, utils

    pixels, named = pixels_of(image), words_of(words)
    if (mask is None) == (not named):
        raise MaskError("say what to remove: connect a mask, or name it in words, and not both")
    if steps < 0 or not 0 <= seed <= 2**64 - len(pixels):
        raise OptionError(f"steps={steps} and seed={seed}: give steps from 0 up, and a seed from 0 to 2^64 - 1")
    given = None if mask is None else read_masks(masks_of(mask), (pixels.shape[2], pixels.shape[3]), len(pixels))
    device = model_management.get_torch_device()
    # The pipeline is none of the models that ComfyUI counts, so they make room for it first.
    model_management.unload_all_models()
    pipe = remover.of(source, device).to(device)
    progress = utils.ProgressBar(steps or 1)

    def follow(pipe: DiffusionPipeline, step: int, t: Tensor, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(step + 1, getattr(pipe, "num_timesteps", steps) or steps)
        return tensors

    try:
        if given is None:
            given = pipe.localize(pixels, named, others=words_of(others)).of_words()
        drawn = pipe(
            pixels, given, prompt=prompt, output_type="pt", callback_on_step_end=follow,
            generator=[torch.Generator("cpu").manual_seed(seed + index) for index in range(len(pixels))],
            **({"num_inference_steps": steps} if steps else {}),
        ).images  # fmt: skip
    finally:
        pipe.to("cpu")
        model_management.soft_empty_cache()
    return image_of(drawn), given.float().cpu()
