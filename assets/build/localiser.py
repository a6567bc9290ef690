"""How well things are found by words: overlap of masks with the true ones, and words that are rightly refused."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import erasure
from erasure.assets.build.measured import figure
from erasure.assets.build.tables import Shown, markdown
from erasure.assets.scenes import Scene, render, sample_scene
from erasure.assets.world import BACKGROUNDS, OBJECTS, STYLES
from erasure.errors import MaskError
from erasure.eval.statistics import Interval, cluster_bootstrap, wilson
from erasure.pipelines import StableDiffusionObjectRemovalPipeline

SHOWN = (
    Scene(("cat",), "noto", "checked"), Scene(("guitar",), "ink", "gradient"),
    Scene(("burger", "umbrella"), "sepia", "striped"), Scene(("car", "house"), "noto", "green"),
    Scene(("rocket",), "pixel", "purple"), Scene(("fish", "bomb"), "contour", "yellow"),
)  # fmt: skip
"""Scenes of the picture; the last object of each is removed."""
CELL, GAP, MARGIN = 144, 8, 150
"""Sides in pixels of a scene in the picture, of what is between two, and of the column of names."""


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


def measure(scenes: int, seed: int = 0) -> list[Found]:
    """Look for every object of random scenes, by its name and those of the others.

    Settings were chosen on scenes of other seeds than 0.
    """
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(seed)
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


def table(found: list[Found]) -> str:
    """Mean overlap of all, of scenes with one object and with two, and in every style."""
    parts = {"all": found}
    parts |= {f"{n} in the scene": [each for each in found if each.objects == n] for n in (1, 2)}
    parts |= {style: [each for each in found if each.style == style] for style in STYLES}
    lines = [[name, f"{Shown(figure(mean(part))):3/3}", str(len(part))] for name, part in parts.items()]
    return markdown(("objects", "IoU", "n"), lines)


def refusals(every: int = 1, absent: int = 6) -> dict[str, list[bool]]:
    """Whether words are refused that stand for what a scene shows, and words that do not.

    Args:
        every: Of the 48 scenes of either kind, every how many are looked at.
        absent: Words for absent things in a scene with one object; a third of them with two.

    Returns:
        By what was asked, one value for each word: whether it was refused.
    """
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    names, rng = list(OBJECTS), np.random.default_rng(0)
    asked: dict[str, list[bool]] = {}

    def ask(kind: str, image: Image.Image, word: str, others: tuple[str, ...] = ()) -> None:
        try:
            pipe.localize(image, word, others=others).of_words()
            asked.setdefault(kind, []).append(False)
        except MaskError:
            asked.setdefault(kind, []).append(True)

    for number in range(0, 2 * len(names), every):
        first = names[number % len(names)]
        left = [name for name in names if name != first]
        second, *others = (left[at] for at in rng.permutation(len(left)))
        style, background = STYLES[number % len(STYLES)], BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        one, two = (
            Image.fromarray(render(Scene(shown, style, background)).image) for shown in ((first,), (first, second))
        )
        ask("alone", one, first)
        for word in others[:absent]:
            ask("absent, one shown", one, word)
        for word, other in ((first, second), (second, first)):
            ask("beside another", two, word)
            ask("beside another that is named", two, word, (other,))
            for name in others[: absent // 3]:
                ask("absent, one of two named", two, name, (other,))
    return asked


def refused(asked: dict[str, list[bool]]) -> str:
    """Shares of words that were refused, with intervals."""
    return markdown(
        ("asked for", "refused", "n"),
        [
            [kind, f"{Shown(figure(wilson(sum(answers), len(answers)))):3/3}", f"{sum(answers)} of {len(answers)}"]
            for kind, answers in asked.items()
        ],
    )


def picture() -> Image.Image:
    """Objects with their masks, inpainting, Attentive Eraser, and the same with the masks that their names find."""
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(erasure.load_pipeline("canvas-sd"))
    pipe.set_progress_bar_config(disable=True)
    rows = ("scene and mask", "inpainting", "Attentive Eraser", "found by its name", "removed by name")
    step = CELL + GAP
    page = Image.new("RGB", (MARGIN + step * len(SHOWN), 32 + step * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for row, name in enumerate(rows):
        pen.text((GAP, 32 + step * row + CELL // 2), name, "black", font, anchor="lm")
    for column, scene in enumerate(SHOWN):
        *others, word = scene.objects
        drawn = render(scene)
        image, truth = Image.fromarray(drawn.image), torch.from_numpy(drawn.masks[-1])
        remove = lambda mask, image=image, **options: (  # noqa: E731
            pipe(image, mask, generator=torch.Generator().manual_seed(0), **options).images[0]
        )
        found = pipe.localize(image, word, others=others).of_words()[0]
        cells = (
            tinted(image, truth, (255, 0, 60)), remove(truth, redirect=False), remove(truth),
            tinted(image, found, (40, 70, 255)), remove(found),
        )  # fmt: skip
        pen.text((MARGIN + step * column + CELL // 2, 16), word, "black", font, anchor="mm")
        for row, cell in enumerate(cells):
            page.paste(cell.resize((CELL, CELL), Image.Resampling.NEAREST), (MARGIN + step * column, 32 + step * row))
    return page


def tinted(image: Image.Image, mask: Tensor, colour: tuple[int, int, int]) -> Image.Image:
    """An image with a colour over what a mask covers."""
    over = Image.fromarray((mask * 150).byte().numpy())
    return Image.composite(Image.new("RGB", image.size, colour), image, over)
