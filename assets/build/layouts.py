"""Count how often things stand where a layout asks for them, in images of A-STAR."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import erasure
from erasure.assets.build.measured import figure
from erasure.assets.build.tables import Shown
from erasure.assets.world import IMAGE_SIZE, OBJECTS, STYLES, noun_phrase
from erasure.eval.detectors import CanvasJudge
from erasure.eval.statistics import Interval, wilson
from erasure.eval.suites.composition import CANVAS
from erasure.pipelines import StableDiffusionAStarPipeline

STEPS = 10
SCALE = 2.0
UNTIL = 0.4
"""Share of the steps at which latents are moved."""
SEED = 7
"""Seed of the pairs. The noise of prompt n has the seed `SEED + n`."""


def sides() -> tuple[Tensor, Tensor]:
    """Masks of the left and of the right half of an image, with a margin, `(height, width)` each."""
    left = torch.zeros(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    left[IMAGE_SIZE // 4 : -IMAGE_SIZE // 8, IMAGE_SIZE // 32 : 15 * IMAGE_SIZE // 32] = True
    return left, left.flip(1)


def measure(prompts: int) -> tuple[Interval, Interval]:
    """Draw random pairs of objects in random styles, each with both layouts and the same noise.

    Args:
        prompts: How many; each gives two images.

    Returns:
        The share of all images that show both objects; and of these the share in which the middle of the object that
        was asked for on the left is left of the other's.
    """
    torch.set_num_threads(1)
    model, judge = erasure.load_pipeline("canvas-sd"), CanvasJudge()
    pipe = StableDiffusionAStarPipeline.from_pipe(model)
    for each in (model, pipe):
        each.set_progress_bar_config(disable=True)
    rng, halves = np.random.default_rng(SEED), sides()
    both = right = 0
    for number in range(prompts):
        pair = [str(name) for name in rng.choice(list(OBJECTS), 2, replace=False)]
        prompt = f"{' and '.join(map(noun_phrase, pair))} in {rng.choice(list(STYLES))} style"
        for first in (0, 1):
            image = pipe(
                prompt, subjects=pair, layout=[halves[first], halves[1 - first]], num_inference_steps=STEPS,
                guidance_scale=SCALE, generator=torch.Generator().manual_seed(SEED + number), **CANVAS,
                segregation_until=UNTIL, retention_until=UNTIL,
            ).images[0]  # fmt: skip
            if not set(pair) <= set(judge([image])[0].objects):
                continue
            both += 1
            masks = model.localize(image, pair).masks[0].double()
            middles = (masks.sum(1) * torch.arange(IMAGE_SIZE)).sum(1) / masks.sum((1, 2))
            # A name that was not found has no middle, and is counted as not on its side.
            right += bool(middles[first] < middles[1 - first])
    return wilson(both, 2 * prompts), wilson(right, both)


def described(both: Interval, right: Interval) -> str:
    """Say both shares in one sentence."""
    return (
        f"{Shown(figure(both)):2/2} of the images show both objects, and of these {Shown(figure(right)):2/2} have "
        "each on the side that was asked for"
    )
