"""Compose Canvas scenes from the sprite atlas: image, clean background and a mask for every object.

The atlas (`canvas-scenes/`) is made by `python -m erasure.assets.build sprites` from openly licensed emoji artwork;
see `LICENSES.md`. Composing a scene takes well under a millisecond, so training and measuring never store rendered
data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from erasure.assets import novel
from erasure.assets.world import (
    BACKGROUNDS,
    EMPTY_TEMPLATES,
    IMAGE_SIZE,
    OBJECTS,
    PAIR_PHRASES,
    SIDED_PHRASES,
    STYLES,
    TEMPLATES,
    noun_phrase,
)

ATLAS = Path(__file__).parent / "canvas-scenes"
SINGLE, PAIR = 56, 34
"""Sprite sides in pixels: alone in the scene, and in a left or right slot."""
PIXEL_CELL = {SINGLE: 4, PAIR: 2}
"""Side of one cell of the `pixel` style at each sprite size; such sprites snap to this grid."""

PLAIN_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (242, 242, 242),
    "yellow": (250, 216, 90),
    "blue": (140, 198, 242),
    "green": (152, 216, 152),
    "pink": (243, 166, 192),
    "purple": (178, 152, 216),
}


@dataclass(frozen=True)
class Scene:
    """What a scene shows."""

    objects: tuple[str, ...]
    """Names of what is drawn, left to right, two at most; from `OBJECTS` or `erasure.assets.novel.THINGS`."""
    style: str
    background: str
    offsets: tuple[tuple[int, int], ...] = ()
    """Shift `(x, y)` of each object from its slot in pixels."""


@dataclass(frozen=True)
class RenderedScene:
    """A scene as pixels."""

    image: np.ndarray
    """`(64, 64, 3)` uint8."""
    background: np.ndarray
    """The same scene without its objects, `(64, 64, 3)` uint8."""
    masks: np.ndarray
    """Visible pixels of each object, `(objects, 64, 64)` bool."""


@cache
def sprites() -> dict[tuple[str, str, int], np.ndarray]:
    """Every sprite as `(side, side, 4)` float32 in 0-1 (straight alpha), keyed by object, style and side."""
    index = json.loads((ATLAS / "sprites.json").read_text())
    atlas = np.asarray(Image.open(ATLAS / "sprites.png").convert("RGBA"), dtype=np.float32) / 255
    found = {}
    for row in index["sprites"]:
        x, y, side = row["x"], row["y"], row["side"]
        found[row["object"], row["style"], side] = atlas[y : y + side, x : x + side]
    return found


def sprite(name: str, style: str, side: int) -> np.ndarray:
    """A sprite of the world or of what is new to it (`erasure.assets.novel`), keyed as `sprites`."""
    if name in novel.THINGS:
        return novel.sprite(name, style, side)
    if style in novel.STYLES:
        return novel.STYLES[style](sprites()[name, novel.PLAIN, side])
    return sprites()[name, style, side]


@cache
def background_pixels(name: str) -> np.ndarray:
    """A bare background, `(64, 64, 3)` float32 in 0-255."""
    side = IMAGE_SIZE
    y, x = np.mgrid[0:side, 0:side]
    if name in PLAIN_COLOURS:
        return np.full((side, side, 3), PLAIN_COLOURS[name], np.float32)
    if name == "gradient":
        top, bottom = np.array((120, 170, 250), np.float32), np.array((255, 205, 170), np.float32)
        share = (y / (side - 1)).astype(np.float32)[..., None]
        return top * (1 - share) + bottom * share
    if name == "striped":
        first, second, choice = (255, 224, 150), (250, 190, 110), (x // 8) % 2
    elif name == "checked":
        first, second, choice = (226, 232, 238), (182, 204, 220), (x // 8 + y // 8) % 2
    else:
        raise ValueError(f"unknown background {name!r}; there are {', '.join(BACKGROUNDS)}")
    return np.where(choice[..., None] == 0, first, second).astype(np.float32)


@dataclass(frozen=True)
class Shadow:
    """The shadow that every object of a scene throws onto the background: its outline, moved, blurred and dark."""

    dx: int
    dy: int
    """Pixels by which it is moved to the right and down."""
    darkness: float = 0.4
    """Share of the background's light that it takes away."""
    blur: float = 1.0
    """Sigma of its soft edge in pixels."""


def light_left(opacity: np.ndarray, shadow: Shadow) -> np.ndarray:
    """Share of a background's light that an object's shadow leaves, `(64, 64)` float32 in 0-1.

    Args:
        opacity: Of the object on the canvas, `(64, 64)` in 0-1.
        shadow: How it is thrown.
    """
    height, width = opacity.shape
    down, right = max(shadow.dy, 0), max(shadow.dx, 0)
    up, left = max(-shadow.dy, 0), max(-shadow.dx, 0)
    moved = np.pad(opacity, ((down, up), (right, left)))[up : up + height, left : left + width]
    soft = Image.fromarray((255 * moved).astype(np.uint8)).filter(ImageFilter.GaussianBlur(shadow.blur))
    return 1 - shadow.darkness * np.asarray(soft, dtype=np.float32) / 255


def render(scene: Scene, without: int | None = None, shadow: Shadow | None = None) -> RenderedScene:
    """Draw a scene: image, clean background and visible mask of every object.

    Args:
        scene: What it shows.
        without: Number of an object that is left out, with its shadow; the others stay where they are.
        shadow: The shadow that every object throws; none when left out.
    """
    background = background_pixels(scene.background)
    canvas = background.copy()
    offsets = scene.offsets or ((0, 0),) * len(scene.objects)
    masks = np.zeros((len(scene.objects), IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    placed = []
    for index, (name, (dx, dy)) in enumerate(zip(scene.objects, offsets, strict=True)):
        if index == without:
            continue
        side = SINGLE if len(scene.objects) == 1 else PAIR
        slot = (IMAGE_SIZE - side) // 2
        x = slot if len(scene.objects) == 1 else (0 if index == 0 else IMAGE_SIZE - side)
        if scene.style == "pixel":
            cell = PIXEL_CELL[side]
            dx, dy = cell * round(dx / cell), cell * round(dy / cell)
            slot -= slot % cell
        x, y = min(max(x + dx, 0), IMAGE_SIZE - side), min(max(slot + dy, 0), IMAGE_SIZE - side)
        pixels = sprite(name, scene.style, side)
        placed.append((index, x, y, side, pixels))
        if shadow is not None:
            opacity = np.zeros(canvas.shape[:2], np.float32)
            opacity[y : y + side, x : x + side] = pixels[..., 3]
            canvas *= light_left(opacity, shadow)[..., None]
    for index, x, y, side, pixels in placed:
        alpha = pixels[..., 3:]
        window = canvas[y : y + side, x : x + side]
        window[:] = window * (1 - alpha) + 255 * pixels[..., :3] * alpha
        masks[:index, y : y + side, x : x + side] &= alpha[..., 0] < 0.5
        masks[index, y : y + side, x : x + side] = alpha[..., 0] >= 0.5
    as_bytes = lambda values: values.round().clip(0, 255).astype(np.uint8)  # noqa: E731
    return RenderedScene(as_bytes(canvas), as_bytes(background), masks)


def sample_scene(rng: np.random.Generator, *, pairs: float = 0.4, empty: float = 0.04) -> Scene:
    """Draw a random scene; `pairs` and `empty` are the shares of scenes with two objects and with none."""
    names = list(OBJECTS)
    kind = rng.random()
    count = 0 if kind < empty else 2 if kind < empty + pairs else 1
    objects = tuple(names[i] for i in rng.choice(len(names), size=count, replace=False))
    reach = (2, 2) if count == 1 else (1, 4)
    offsets = tuple(
        (int(rng.integers(-reach[0], reach[0] + 1)), int(rng.integers(-reach[1], reach[1] + 1))) for _ in objects
    )
    return Scene(objects, STYLES[rng.integers(len(STYLES))], BACKGROUNDS[rng.integers(len(BACKGROUNDS))], offsets)


def caption(
    scene: Scene, rng: np.random.Generator, *, synonyms: float = 0.1, groups: float = 0.03, turned: float = 0.5
) -> str:
    """A random caption of a scene.

    Args:
        scene: What to describe.
        rng: Says which caption.
        synonyms: Chance that an object goes by another word ("kitten").
        groups: Chance that an object goes by its super-category ("animal").
        turned: Chance that of two objects the right one is named first, where no word says which is where.
    """

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    if not scene.objects:
        return pick(EMPTY_TEMPLATES).format(background=scene.background)
    words = []
    for name in scene.objects:
        others, chance = OBJECTS[name].synonyms, rng.random()
        if chance < groups:
            name = OBJECTS[name].group
        elif others and chance < groups + synonyms:
            name = pick(others)
        words.append(noun_phrase(name))
    form = "{left}" if len(words) == 1 else pick(PAIR_PHRASES)
    if len(words) == 2 and form not in SIDED_PHRASES and rng.random() < turned:
        words.reverse()
    phrase = form.format(left=words[0], right=words[-1])
    return pick(TEMPLATES).format(object=phrase, style=scene.style, background=scene.background)


def captions(count: int, seed: int) -> list[str]:
    """Captions of random scenes, and now and then the empty prompt: what a text tower of Canvas sees."""
    rng = np.random.default_rng(seed)
    return ["" if rng.random() < 0.01 else caption(sample_scene(rng), rng) for _ in range(count)]
