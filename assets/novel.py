"""Things and styles that no model of the embedded world was trained on: drawn by code, each with its true mask.

They stand in for what a user brings in a picture, such as a logo: models learn them from one picture of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

GRID = 100
"""Side of the square that things are drawn in, in units."""
OVERSAMPLING = 4
"""Pixels that a thing is drawn in for each of its side."""
INK = (40, 36, 60)
"""Colour of outlines."""
Points = list[tuple[float, float]]


class Pen:
    """Draws on a transparent square of `GRID` units."""

    def __init__(self, side: int) -> None:
        self.unit = side / GRID
        self.image = Image.new("RGBA", (side, side))
        self.on = ImageDraw.Draw(self.image)
        self.width = max(1, round(3 * self.unit))

    def _scaled(self, points: Points) -> Points:
        return [(x * self.unit, y * self.unit) for x, y in points]

    def shape(self, points: Points, fill: tuple[int, int, int]) -> None:
        """A filled polygon with an outline."""
        self.on.polygon(self._scaled(points), fill=fill, outline=INK, width=self.width)

    def ball(self, x: float, y: float, radius: float, fill: tuple[int, int, int], height: float = 1.0) -> None:
        """A filled ellipse with an outline; `height` is its height over its width."""
        box = self._scaled([(x - radius, y - radius * height), (x + radius, y + radius * height)])
        self.on.ellipse([*box[0], *box[1]], fill=fill, outline=INK, width=self.width)

    def box(self, left: float, top: float, right: float, bottom: float, fill: tuple[int, int, int]) -> None:
        """A filled rectangle with round corners and an outline."""
        (a, b), (c, d) = self._scaled([(left, top), (right, bottom)])
        self.on.rounded_rectangle([a, b, c, d], 5 * self.unit, fill=fill, outline=INK, width=self.width)

    def line(self, points: Points, colour: tuple[int, int, int], width: float) -> None:
        """A line of a width in units."""
        self.on.line(self._scaled(points), fill=colour, width=max(1, round(width * self.unit)), joint="curve")


def around(x: float, y: float, radii: tuple[float, ...], count: int) -> Points:
    """`count` points around a centre, whose distances go through `radii` over and over."""
    turns = [(2 * pi * i / count - pi / 2, radii[i % len(radii)]) for i in range(count)]
    return [(x + radius * cos(turn), y + radius * sin(turn)) for turn, radius in turns]


def robot(pen: Pen) -> None:
    """A square head with an aerial and two round eyes."""
    pen.line([(50, 24), (50, 8)], INK, 4)
    pen.ball(50, 9, 6, (240, 70, 70))
    pen.box(6, 44, 20, 66, (120, 130, 150))
    pen.box(80, 44, 94, 66, (120, 130, 150))
    pen.box(15, 22, 85, 92, (80, 190, 205))
    pen.ball(35, 48, 11, (255, 255, 255))
    pen.ball(65, 48, 11, (255, 255, 255))
    pen.ball(35, 48, 4, INK)
    pen.ball(65, 48, 4, INK)
    pen.box(30, 70, 70, 80, (250, 210, 80))


def cactus(pen: Pen) -> None:
    """A green column with two arms in a red pot."""
    for side in (-1, 1):
        x = 50 + side * 30
        pen.line([(50, 56 + 4 * side), (x, 56 + 4 * side), (x, 30 + 4 * side)], INK, 18)
        pen.line([(50, 56 + 4 * side), (x, 56 + 4 * side), (x, 32 + 4 * side)], (70, 170, 80), 12)
    pen.box(36, 6, 64, 76, (70, 170, 80))
    for y in range(16, 70, 12):
        pen.line([(46, y), (46, y + 5)], (235, 245, 200), 3)
        pen.line([(55, y + 6), (55, y + 11)], (235, 245, 200), 3)
    pen.shape([(24, 70), (76, 70), (69, 96), (31, 96)], (205, 95, 55))


def star(pen: Pen) -> None:
    """A violet star with a yellow heart of its own shape."""
    pen.shape(around(50, 53, (48, 21), 10), (130, 70, 200))
    pen.shape(around(50, 53, (25, 11), 10), (255, 220, 70))


def crown(pen: Pen) -> None:
    """Five points with balls on a band with stones."""
    pen.shape([(10, 80), (4, 30), (28, 54), (50, 16), (72, 54), (96, 30), (90, 80)], (245, 190, 50))
    for x, y in ((6, 28), (50, 14), (94, 28)):
        pen.ball(x, y, 6, (225, 60, 90))
    pen.box(10, 72, 90, 92, (225, 140, 30))
    for x in (28, 50, 72):
        pen.ball(x, 82, 6, (70, 130, 230))


def balloon(pen: Pen) -> None:
    """A striped balloon above a basket."""
    pen.line([(32, 56), (42, 82)], INK, 3)
    pen.line([(68, 56), (58, 82)], INK, 3)
    pen.ball(50, 35, 33, (235, 80, 120))
    pen.ball(50, 35, 20, (255, 255, 255), height=1.65)
    pen.ball(50, 35, 8, (70, 120, 220), height=4.1)
    pen.box(38, 78, 62, 97, (170, 115, 65))


def lighthouse(pen: Pen) -> None:
    """A tower in red and white with a lamp."""
    pen.shape([(34, 28), (66, 28), (78, 94), (22, 94)], (250, 250, 250))
    for top in (38, 64):
        left, right = 34 - 12 * (top - 28) / 66, 66 + 12 * (top - 28) / 66
        pen.shape([(left, top), (right, top), (right + 2.5, top + 13), (left - 2.5, top + 13)], (215, 50, 50))
    pen.box(36, 14, 64, 30, (255, 230, 90))
    pen.shape([(30, 16), (50, 2), (70, 16)], (60, 90, 160))
    pen.box(14, 90, 86, 98, (120, 110, 100))


def donut(pen: Pen) -> None:
    """A ring with blue icing and sprinkles."""
    pen.ball(50, 50, 45, (215, 160, 95))
    pen.ball(50, 49, 38, (90, 170, 240))
    for index, (x, y) in enumerate(around(50, 50, (26, 31), 14)):
        pen.line([(x, y), (x + 5, y + (3 if index % 2 else -3))], [(255, 90, 120), (255, 240, 90)][index % 2], 4)
    hole = Image.new("L", pen.image.size, 255)
    reach = [(50 - 15) * pen.unit, (50 + 15) * pen.unit]
    ImageDraw.Draw(hole).ellipse([reach[0], reach[0], reach[1], reach[1]], fill=0)
    pen.image.putalpha(Image.fromarray(np.minimum(np.asarray(hole), np.asarray(pen.image.getchannel("A")))))


def gem(pen: Pen) -> None:
    """A cut stone with facets."""
    pen.shape([(24, 18), (76, 18), (97, 44), (50, 95), (3, 44)], (60, 205, 165))
    pen.shape([(24, 18), (36, 44), (3, 44)], (150, 240, 210))
    pen.shape([(76, 18), (64, 44), (97, 44)], (30, 160, 130))
    pen.shape([(36, 44), (64, 44), (50, 95)], (190, 250, 230))


THINGS: dict[str, Callable[[Pen], None]] = {
    thing.__name__: thing for thing in (robot, cactus, star, crown, balloon, lighthouse, donut, gem)
}
"""The new things, by name."""


def drawn(thing: str, side: int) -> np.ndarray:
    """A new thing as `(side, side, 4)` float in 0-1, straight alpha."""
    pen = Pen(side * OVERSAMPLING)
    THINGS[thing](pen)
    return _shrunk(np.asarray(pen.image, dtype=np.float32) / 255, side)


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """Averaged down to `side` pixels in premultiplied alpha."""
    factor = image.shape[0] // side
    premultiplied = np.dstack([image[..., :3] * image[..., 3:], image[..., 3]])
    small = premultiplied.reshape(side, factor, side, factor, 4).mean(axis=(1, 3))
    alpha = small[..., 3:]
    return np.dstack([small[..., :3] / np.maximum(alpha, 1e-6), alpha]).clip(0, 1).astype(np.float32)


def mosaic(sprite: np.ndarray) -> np.ndarray:
    """Tiles of three to four pixels with dark joints between them."""
    side, tile = sprite.shape[0], max(3, sprite.shape[0] // 14)
    made = sprite.copy()
    for y in range(0, side, tile):
        for x in range(0, side, tile):
            cell = made[y : y + tile, x : x + tile]
            weight = cell[..., 3:].sum()
            if weight > 0:
                cell[..., :3] = (cell[..., :3] * cell[..., 3:]).sum((0, 1)) / weight
            cell[0, :, :3] *= 0.35
            cell[:, 0, :3] *= 0.35
    return made


def neon(sprite: np.ndarray) -> np.ndarray:
    """Glowing lines in magenta and cyan on a dark body."""
    grey = sprite[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32) * sprite[..., 3]
    edges = np.hypot(*np.gradient(grey)) + np.hypot(*np.gradient(sprite[..., 3]))
    lines = np.clip(edges * 2.5, 0, 1)[..., None]
    rows = np.linspace(0, 1, sprite.shape[0], dtype=np.float32)[:, None, None]
    glow = np.array([1.0, 0.2, 0.8], np.float32) * (1 - rows) + np.array([0.1, 0.95, 1.0], np.float32) * rows
    body = np.array([0.08, 0.05, 0.16], np.float32)
    return np.dstack([body * (1 - lines) + glow * lines, sprite[..., 3]]).astype(np.float32)


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mosaic": mosaic, "neon": neon}
"""The new artists: what they make of a sprite, new or known."""
PLAIN = "noto"
"""Style of the embedded world that new things are drawn in: flat colours with outlines. Artists start from it."""


@cache
def sprite(thing: str, style: str, side: int) -> np.ndarray:
    """A new thing in `PLAIN` or one of the new styles, `(side, side, 4)` float32 in 0-1 (straight alpha)."""
    plain = drawn(thing, side)
    return plain if style == PLAIN else STYLES[style](plain)
