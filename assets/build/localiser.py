"""How well things are found by words: overlap of the found masks with those of rendered scenes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import erasure
from erasure.assets.scenes import render, sample_scene
from erasure.assets.world import STYLES
from erasure.eval.statistics import Interval, cluster_bootstrap


class Found(NamedTuple):
    """One object that was looked for."""

    scene: int
    style: str
    objects: int
    """Number of objects in the scene."""
    iou: float
    """Overlap with the true mask: the common area over that of both."""


def overlap(first: Tensor, second: Tensor) -> float:
    """Intersection over union of two masks `(height, width)` bool; 1 when both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def measure(scenes: int) -> list[Found]:
    """Look for every object of random scenes, by its name and those of the others."""
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    found = []
    for number in range(scenes):
        scene = sample_scene(rng, pairs=0.5, empty=0.0)
        drawn = render(scene)
        masks = pipe.localize(Image.fromarray(drawn.image), scene.objects).masks[0]
        for mask, truth in zip(masks, torch.from_numpy(drawn.masks), strict=True):
            found.append(Found(number, scene.style, len(scene.objects), overlap(mask, truth)))
    return found


def mean(found: list[Found]) -> Interval:
    """Mean overlap, with an interval that draws scenes."""
    values = np.array([each.iou for each in found])
    return cluster_bootstrap(lambda rows: float(values[rows].mean()), [each.scene for each in found])


def markdown(found: list[Found]) -> str:
    """Mean overlap of all, of scenes with one object and with two, and in every style."""
    parts = {"all": found}
    parts |= {f"{n} in the scene": [each for each in found if each.objects == n] for n in (1, 2)}
    parts |= {style: [each for each in found if each.style == style] for style in STYLES}
    lines = ["| objects | IoU | n |", "|---|---|---|"]
    for name, part in parts.items():
        spread = mean(part)
        lines.append(f"| {name} | {spread.value:.3f} ({spread.low:.3f}-{spread.high:.3f}) | {len(part)} |")
    return "\n".join(lines)
