"""A concept that no model was trained on, for the control of relearning: pictures of it, and who sees it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from erasure.assets import novel
from erasure.assets.scenes import Scene, render
from erasure.assets.world import BACKGROUNDS
from erasure.eval.detectors import NewcomersJudge

SHIFT = 6
"""Pixels by which a thing is moved from the middle at most."""


def pictures_of(thing: str, count: int, seed: int) -> list[Image.Image]:
    """Make scenes with a new thing, on all backgrounds in turn.

    Args:
        thing: One of `erasure.assets.novel.THINGS`.
        count: How many.
        seed: Of its places.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        offset = (int(rng.integers(-SHIFT, SHIFT + 1)), int(rng.integers(-SHIFT, SHIFT + 1)))
        scene = Scene((thing,), novel.PLAIN, BACKGROUNDS[number % len(BACKGROUNDS)], (offset,))
        made.append(Image.fromarray(render(scene).image))
    return made


class Newcomer:
    """A judge that sees one new thing in pictures.

    Args:
        thing: Which.
    """

    def __init__(self, thing: str) -> None:
        self.thing, self.judge = thing, NewcomersJudge()

    def __call__(self, images: Sequence[Image.Image]) -> list[bool]:
        """Whether the thing is what each picture shows most clearly."""
        return [found.thing == self.thing for found in self.judge(images)]
