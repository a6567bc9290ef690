"""Fetch the artwork with npm at pinned versions and render the sprite atlas.

Styles: `noto` (Google's colour set), `ink` (Microsoft's high-contrast set) and three renderings of Microsoft's sets:
`pixel` (few large cells, six colours), `contour` (edges of the flat set) and `sepia` (luminance of the shaded set).
"""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from erasure.assets.scenes import ATLAS, PAIR, PIXEL_CELL, SINGLE
from erasure.assets.world import OBJECTS, STYLES

PACKAGES = {
    "noto": "1.2.9",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
}
"""Artwork sets and their versions, all from the npm scope `@iconify-json`."""

INK_COLOUR = "#1c1c28"
LINE_COLOUR = np.array([0.10, 0.25, 0.75])
PAPER_COLOUR = np.array([0.99, 0.99, 0.99])
SEPIA_DARK, SEPIA_LIGHT = np.array([0.22, 0.11, 0.03]), np.array([0.98, 0.85, 0.60])
OVERSAMPLING = 4


def fetch(folder: Path) -> None:
    """Install the pinned artwork packages below `folder` with npm (does nothing for those already there)."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [f"@iconify-json/{name}@{version}" for name, version in PACKAGES.items() if not _is_there(folder, name)]
    if missing:
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *missing], check=True)


def _is_there(folder: Path, name: str) -> bool:
    manifest = folder / "node_modules" / "@iconify-json" / name / "package.json"
    return manifest.is_file() and json.loads(manifest.read_text())["version"] == PACKAGES[name]


class Artwork:
    """The icons of one artwork set, rendered from SVG."""

    def __init__(self, folder: Path, name: str) -> None:
        self.icons = json.loads((folder / "node_modules" / "@iconify-json" / name / "icons.json").read_text())

    def render(self, icon: str, side: int) -> np.ndarray:
        """An icon as `(side, side, 4)` float in 0-1, straight alpha."""
        import resvg_py

        while icon not in self.icons["icons"]:
            icon = self.icons["aliases"][icon]["parent"]
        entry = self.icons["icons"][icon]
        box = [entry.get(key, self.icons.get(key, default)) for key, default in
               (("left", 0), ("top", 0), ("width", 16), ("height", 16))]  # fmt: skip
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="{INK_COLOUR}" '
            f'viewBox="{box[0]} {box[1]} {box[2]} {box[3]}" width="{side}" height="{side}">{entry["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float64) / 255


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Average down to `side` pixels in premultiplied alpha."""
    factor = image.shape[0] // side
    premultiplied = np.dstack([image[..., :3] * image[..., 3:], image[..., 3]])
    small = premultiplied.reshape(side, factor, side, factor, 4).mean(axis=(1, 3))
    alpha = small[..., 3:]
    return np.dstack([small[..., :3] / np.maximum(alpha, 1e-6), alpha]).clip(0, 1)


def pixelate(image: np.ndarray, cells: int, cell: int) -> np.ndarray:
    """Pixel art: `cells` x `cells` cells of `cell` pixels, six colours, hard edges."""
    small = shrink(image, cells)
    colours = Image.fromarray((small[..., :3] * 255).astype(np.uint8)).quantize(6, kmeans=2).convert("RGB")
    solid = np.dstack([np.asarray(colours) / 255, small[..., 3] > 0.43])
    return solid.repeat(cell, axis=0).repeat(cell, axis=1)


def outline(image: np.ndarray) -> np.ndarray:
    """Contour drawing: blue lines where colour or alpha changes, white paper inside."""
    channels = [image[..., i] * image[..., 3] for i in range(3)] + [image[..., 3]]
    edges = np.zeros(image.shape[:2])
    for channel in channels:
        smooth = ndimage.gaussian_filter(channel, 2)
        edges = np.maximum(edges, np.hypot(ndimage.sobel(smooth, 0), ndimage.sobel(smooth, 1)))
    lines = ndimage.binary_dilation(edges > 0.22, iterations=2)
    return np.dstack([np.where(lines[..., None], LINE_COLOUR, PAPER_COLOUR), np.maximum(image[..., 3], lines)])


def tone(image: np.ndarray) -> np.ndarray:
    """Sepia: luminance mapped between a dark and a light brown."""
    light = ((image[..., :3] @ [0.30, 0.59, 0.11] - 0.1) / 0.85).clip(0, 1)[..., None]
    return np.dstack([SEPIA_DARK * (1 - light) + SEPIA_LIGHT * light, image[..., 3]])


def draw(sets: dict[str, Artwork], icon: str, style: str, side: int) -> np.ndarray:
    """One sprite, `(side, side, 4)` float in 0-1."""
    large = OVERSAMPLING * side
    if style == "noto":
        return shrink(sets["noto"].render(icon, large), side)
    if style == "ink":
        return shrink(sets["fluent-emoji-high-contrast"].render(icon, large), side)
    if style == "contour":
        return shrink(outline(sets["fluent-emoji-flat"].render(icon, large)), side)
    if style == "sepia":
        return tone(shrink(sets["fluent-emoji"].render(icon, large), side))
    if style == "pixel":
        cells = side // PIXEL_CELL[side]
        return pixelate(sets["fluent-emoji-flat"].render(icon, 16 * cells), cells, PIXEL_CELL[side])
    raise ValueError(f"no rendering for style {style!r}")


def build(folder: Path, out: Path = ATLAS) -> None:
    """Fetch the artwork into `folder` and write `sprites.png` and `sprites.json` to `out`."""
    fetch(folder)
    sets = {name: Artwork(folder, name) for name in PACKAGES}
    cell = SINGLE + PAIR
    atlas = np.zeros((len(OBJECTS) * SINGLE, len(STYLES) * cell, 4))
    index = []
    for row, (name, thing) in enumerate(OBJECTS.items()):
        for column, style in enumerate(STYLES):
            for side, shift in ((SINGLE, 0), (PAIR, SINGLE)):
                x, y = column * cell + shift, row * SINGLE
                atlas[y : y + side, x : x + side] = draw(sets, thing.icon, style, side)
                index.append({"object": name, "style": style, "side": side, "x": x, "y": y})
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray((atlas * 255).round().astype(np.uint8)).save(out / "sprites.png", optimize=True)
    (out / "sprites.json").write_text(json.dumps({"packages": PACKAGES, "sprites": index}, indent=0) + "\n")
