"""State of the sampling of an image (a drawing): how many of its noise levels are done.

Steps are counted by the noise levels of the schedule, each once, because higher-order samplers evaluate a level twice.
A fixed share of the schedule is thus half as many steps of 25 as of 50.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from erasure.backbones.parametrisation import TIMESTEPS
from erasure.carriers.safety import OF_STEPS, Moments


@dataclass
class Drawing:
    """State of the sampling that a thread is in."""

    schedule: object = None
    """Timesteps object of the sampler. Every call of a pipeline creates a new one, so a new object means a new
    drawing."""
    levels: Sequence[float] = ()
    """Noise levels of the schedule, each once, highest first."""
    start: float = math.inf
    """First noise level that was evaluated; lower than the schedule's first in image-to-image calls."""
    level: float = math.inf
    """Last noise level that was evaluated."""
    latents: Tensor | None = None
    """Latents of the last evaluation."""
    moments: dict[int, Moments] = field(default_factory=dict)
    """Momentum of each safety guidance, by its index among the terms."""


def levels_of(schedule: object, noisiest: float) -> list[float]:
    """Give a schedule's noise levels in the denoiser's units, each once, highest first."""
    if not isinstance(schedule, Tensor):
        return []
    return [level * noisiest / TIMESTEPS for level in schedule.detach().float().cpu().unique().flip(0).tolist()]


def begin(warmup: int, drawing: Drawing | None, noisiest: float) -> float:
    """Give the noise level below which guidance acts, after a warm-up given in steps of `OF_STEPS`."""
    if drawing is None or not drawing.levels:
        return noisiest * (1 - warmup / OF_STEPS) if warmup else math.inf
    steps = warmup * len(drawing.levels) // OF_STEPS
    # The result lies between two levels, because half precision rounds the denoiser's timestep.
    return sum(drawing.levels[steps - 1 : steps + 1]) / 2 if steps else math.inf


def is_over(steps: int, drawing: Drawing | None, level: float) -> bool:
    """Whether a drawing is past its first `steps` of `OF_STEPS`; never true outside of a drawing."""
    if drawing is None:
        return False
    # The tolerance is for half precision, which rounds the denoiser's timestep.
    levels = [each for each in drawing.levels if each <= 1.001 * drawing.start]
    count = (steps - 1) * len(levels) // OF_STEPS + 1
    return count < len(levels) and level < sum(levels[count - 1 : count + 1]) / 2
