"""What attacks with pictures share: which call another pipeline of diffusers takes, and parts of pictures."""

from __future__ import annotations

import inspect
import math

from PIL import Image

from erasure.backbones import Backbone
from erasure.eval.attacks.changes import Task, pipeline_class
from erasure.eval.samples import Sample

SD3_INPAINTS = (16, 33)
"""Channels that diffusers' inpainting pipeline of Stable Diffusion 3 takes."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


def lacks_task(backbone: Backbone, task: Task) -> str:
    """Say that diffusers has no pipeline for another task on such a model, or none that runs; empty where it has."""
    kind, config = pipeline_class(backbone.pipe, task), backbone.denoiser.config
    if kind is None:
        return f"diffusers has no {task} pipeline for its family"
    if kind.__name__ == "StableDiffusion3InpaintPipeline" and config.get("in_channels") not in SD3_INPAINTS:
        return f"diffusers' {kind.__name__} takes 16 channels only, and this model has {config.get('in_channels')}"
    if kind.__name__ == "ChromaInpaintPipeline" and config.get("guidance_embeds") is None:
        return f"diffusers' {kind.__name__} asks its transformer for guidance_embeds, which Chroma's has not"
    return ""


def arguments_of(backbone: Backbone, task: Task, sample: Sample) -> dict[str, object]:
    """Arguments of a sample's ordinary call that the pipeline for another task does not take, each `None`.

    Args:
        backbone: The model.
        task: The task.
        sample: The sample.
    """
    kind = pipeline_class(backbone.pipe, task)
    assert kind is not None, "asked for by `lacks`"
    size = (sample.height, sample.width)
    ordinary = backbone.call_options(sample.guidance_scale, sample.num_inference_steps, size)
    taken = inspect.signature(kind.__call__).parameters
    # Noise is added to the picture, by the pipeline, and none is given.
    return {"latents": None, **{name: None for name in ordinary if name not in taken}}


def whole_steps(steps: int, strength: float) -> int:
    """Steps of a whole schedule of which a share is taken, so that as many as ordinary ones are."""
    return math.ceil(steps / strength)


def middle(image_size: tuple[int, int], share: float) -> Box:
    """The box in the middle of a picture whose sides are a share of the picture's, in whole pixels.

    Args:
        image_size: Width and height.
        share: Of each side, 0-1.
    """
    (width, height), (across, down) = image_size, (max(1, round(side * share)) for side in image_size)
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def hole(image_size: tuple[int, int], box: Box) -> Image.Image:
    """A mask, white in a box and black elsewhere."""
    mask = Image.new("L", image_size, 0)
    mask.paste(255, box)
    return mask
