"""What eval-unlearn 1.1.2 makes of answers, cosines and pictures, as plain arithmetic that explains its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, harmonic_mean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 299
"""Pixels along a side of what the network of its FID is given."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the colours of ImageNet."""


class Rates(NamedTuple):
    """Unlearning accuracy and in-domain retain accuracy, and how many pictures each is a share of."""

    ua: float
    ira: float
    targets: int
    retained: int


def two_way(scores: Mapping[str, float], target: str, retained: str) -> bool:
    """Whether a picture is taken for the retained name, where no third answer is allowed; a tie is the target's.

    Args:
        scores: Any score that grows with how well a name fits.
        target: Name of what was erased.
        retained: Name of what was kept.
    """
    return scores[retained] > scores[target]


def cut_in_batches(taken_for_retained: Sequence[bool], targets: int, batch: int) -> Rates:
    """UA and IRA where every batch is cut at the number of all target prompts.

    The number of target prompts of the whole list is handed on with each batch, and as many of a batch's first
    pictures are counted as targets. Where one batch holds the whole list, the cut is in the right place.

    Args:
        taken_for_retained: Answer for each picture, see `two_way`; those of target prompts come first.
        targets: Number of target prompts.
        batch: Pictures per batch.

    Returns:
        The rates; one of no picture at all is 0.
    """
    first: list[bool] = []
    second: list[bool] = []
    for start in range(0, len(taken_for_retained), batch):
        part = taken_for_retained[start : start + batch]
        first += part[:targets]
        second += part[targets:]
    return Rates(fmean(first) if first else 0.0, fmean(second) if second else 0.0, len(first), len(second))


def clip_score_times_100(cosines: Sequence[float]) -> float:
    """CLIP score as 100 times the mean cosine, which may be negative."""
    return 100 * fmean(cosines)


def err_of(forgetting: float | None, retention: float | None, robustness: float | None) -> float:
    """ERR: the harmonic mean of the arms that were measured."""
    return harmonic_mean([arm for arm in (forgetting, retention, robustness) if arm is not None])


def inception_pixels(picture: Image.Image) -> Tensor:
    """A picture as its FID gives it to the network: resized without keeping its shape, `(3, 299, 299)` in [-1, 1]."""
    values = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def normalised_again(pixels: Tensor) -> Tensor:
    """Pixels as the first layer of torchvision's Inception has them, which normalises its input by itself.

    With published weights it takes pixels that are normalised by the mean and deviation of ImageNet, and turns them
    into [-1, 1]; those of its FID are there already, and come out with less than half of the contrast.

    Args:
        pixels: `(3, h, w)` in [-1, 1], see `inception_pixels`.
    """
    mean, deviation = (torch.tensor(each)[:, None, None] for each in IMAGENET)
    return (pixels * deviation + mean) * 2 - 1


def different_noises(prompts: int, batch: int) -> int:
    """Different noises among the pictures of a list that is drawn with a seed, which starts again in every batch."""
    return min(prompts, batch)
