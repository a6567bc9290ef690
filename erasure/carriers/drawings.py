"""What is known of a drawing that a denoiser is asked for: how many of its noise levels have been denoised.

Steps are counted by noise levels of the schedule in use, each once: samplers of higher order ask about a level twice,
and a drawing of 25 steps has half as many as one of 50.
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
    """What is known of the drawing that a thread is at."""

    schedule: object = None
    """The noise levels of its sampler: every call of a pipeline sets new ones."""
    levels: Sequence[float] = ()
    """The same, each once, highest first."""
    start: float = math.inf
    """The first that was asked about: a drawing on a picture begins farther down."""
    level: float = math.inf
    """The last that was asked about."""
    latents: Tensor | None = None
    """What was to be denoised then."""
    moments: dict[int, Moments] = field(default_factory=dict)
    """By place among the terms."""


def levels_of(schedule: object, noisiest: float) -> list[float]:
    """The noise levels of a sampler as the denoiser is told them, each once, highest first."""
    if not isinstance(schedule, Tensor):
        return []
    return [level * noisiest / TIMESTEPS for level in schedule.detach().float().cpu().unique().flip(0).tolist()]


def begin(warmup: int, drawing: Drawing | None, noisiest: float) -> float:
    """The noise level below which guidance acts: as many of the drawing's steps are left out as of `OF_STEPS`."""
    if drawing is None or not drawing.levels:
        return noisiest * (1 - warmup / OF_STEPS) if warmup else math.inf
    steps = warmup * len(drawing.levels) // OF_STEPS
    # Between two levels: half precision rounds what the denoiser is told.
    return sum(drawing.levels[steps - 1 : steps + 1]) / 2 if steps else math.inf


def is_over(steps: int, drawing: Drawing | None, level: float) -> bool:
    """Whether a drawing has had its first steps, counted in `OF_STEPS`; a pass of none never has."""
    if drawing is None:
        return False
    # Half precision rounds what the denoiser is told.
    levels = [each for each in drawing.levels if each <= 1.001 * drawing.start]
    count = (steps - 1) * len(levels) // OF_STEPS + 1
    return count < len(levels) and level < sum(levels[count - 1 : count + 1]) / 2
