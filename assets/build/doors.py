"""Measure which parts of a prompt's encoding carry it: each part alone, all but it, and with another prompt's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from erasure.assets.build.evaluate import generate_from
from erasure.assets.build.measured import Row
from erasure.assets.build.words import described
from erasure.assets.scenes import Scene
from erasure.eval.detectors import CanvasJudge

Encoding = Mapping[str, Tensor]
"""`prompt_embeds` and `pooled_prompt_embeds`, as pipelines take them."""
Place = tuple[str, slice, slice]
"""Argument of the pipeline, tokens (a pooled vector has none) and columns."""
CASES = ("alone_object", "alone_style", "without_object", "swapped_object", "swapped_change")
"""Figures of every part; see `figures`."""


def encode(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """Encode prompts as the pipeline does itself."""
    if isinstance(pipe, FluxPipeline):
        length = pipe.tokenizer_2.model_max_length
        tokens, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=length)
    elif isinstance(pipe, StableDiffusion3Pipeline):
        length = pipe.tokenizer_3.model_max_length
        tokens, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    elif isinstance(pipe, StableDiffusionXLPipeline):
        tokens, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    else:
        raise TypeError(f"{type(pipe).__name__} has one door only")
    return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}


def places(pipe: DiffusionPipeline) -> dict[str, list[Place]]:
    """Find where each part of a prompt stands in its encoding: the tokens of each text encoder, the pooled vector."""
    every = slice(None)
    pooled: list[Place] = [("pooled_prompt_embeds", every, every)]
    if isinstance(pipe, FluxPipeline):
        return {"tokens": [("prompt_embeds", every, every)], "pooled": pooled}
    first, second = pipe.text_encoder.config.hidden_size, pipe.text_encoder_2.config.hidden_size
    ahead = slice(pipe.tokenizer.model_max_length) if isinstance(pipe, StableDiffusion3Pipeline) else every
    found: dict[str, list[Place]] = {
        "tokens_1": [("prompt_embeds", ahead, slice(first))],
        "tokens_2": [("prompt_embeds", ahead, slice(first, first + second))],
        "pooled": pooled,
    }
    if isinstance(pipe, StableDiffusion3Pipeline):
        found["tokens_3"] = [("prompt_embeds", slice(ahead.stop, None), every)]
    return found


def exchanged(own: Encoding, other: Encoding, at: Sequence[Place]) -> dict[str, Tensor]:
    """An encoding with some parts of another."""
    mixed = {name: states.clone() for name, states in own.items()}
    for name, tokens, columns in at:
        where = (slice(None), tokens, columns) if mixed[name].ndim == 3 else (slice(None), columns)
        mixed[name][where] = other[name][where]
    return mixed


@torch.no_grad()
def figures(pipe: DiffusionPipeline, scenes: list[Scene]) -> dict[str, float]:
    """Measure what every part does to images of scenes with one object each, all under the same noise.

    Of each part: `_alone_object` and `_alone_style`, shares of images right when the other parts are the empty
    prompt's; `_without_object`, the same when only this part is the empty prompt's; `_swapped_object`, share that
    still shows its own object when this part is another prompt's; and `_swapped_change`, mean difference of pixels in
    0-1 that the swap makes.

    Args:
        pipe: A model of Canvas whose prompts enter by several doors.
        scenes: The scenes, each of another object than the one behind it.
    """
    prompts = [described(scene) for scene in scenes]
    own, empty = encode(pipe, prompts), encode(pipe, [""] * len(scenes))
    other = {name: states.roll(1, 0) for name, states in own.items()}
    judge, seeds = CanvasJudge(), list(range(3000, 3000 + len(scenes)))
    stock = _pixels(generate_from(pipe, own, seeds))
    made: dict[str, float] = {}
    for part, at in places(pipe).items():
        cases: dict[str, dict[str, Any]] = {
            "alone": exchanged(empty, own, at), "without": exchanged(own, empty, at),
            "swapped": exchanged(own, other, at),
        }  # fmt: skip
        for case, encoding in cases.items():
            images = generate_from(pipe, encoding, seeds)
            answers = list(zip(judge(images), scenes, strict=True))
            made[f"{part}_{case}_object"] = float(np.mean([a.object == s.objects[0] for a, s in answers]))
            if case == "alone":
                made[f"{part}_alone_style"] = float(np.mean([a.style == s.style for a, s in answers]))
            if case == "swapped":
                made[f"{part}_swapped_change"] = float(np.abs(_pixels(images) - stock).mean())
    return made


def rows(model: str, found: Mapping[str, float]) -> list[Row]:
    """A row for each way into the denoiser, from the figures of a model; see `figures`."""
    made: dict[str, Row] = {}
    for name, value in found.items():
        for case in CASES:
            if name.endswith(f"_{case}"):
                part = name.removesuffix(f"_{case}")
                made.setdefault(part, {"model": model, "part": part})[case] = round(value, 4)
    return list(made.values())


def _pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.float32) for image in images]) / 255
