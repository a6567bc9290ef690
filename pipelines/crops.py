"""Crops of a large picture for object removal, each at the size that the model was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.masks import blend, fitted, grow
from erasure.pipelines.pictures import resized
from erasure.pipelines.removal_settings import RemovalSettings

CELLS = 128
"""Largest number of rows and columns of the grid on which the parts of a mask are separated."""


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the rectangle in the last two axes."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def around(self, other: Box) -> Box:
        """Give the smallest box that contains both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Box(top, left, bottom - top, right - left)


class Crop(NamedTuple):
    """A part of a picture around one or several parts of its mask."""

    box: Box
    own: Tensor
    """Mask of what is removed with this crop, `(height, width)` bool; other parts of the mask may reach into the
    crop."""


def plan_crops(mask: Tensor, side: int, context: float) -> list[Crop]:
    """Plan crops that cover a mask; each is a square unless the picture is too short for one.

    A crop has at least the model's side, so that nothing is enlarged; a larger one adds a share of the mask's extent
    on every side. Parts of a mask share a crop if it needs not be larger than the larger of their own crops; distant
    parts get their own crops, which keeps each of them sharp.

    Args:
        mask: `(height, width)` bool.
        side: Side in pixels of the images that the model draws.
        context: Surroundings on every side, as a share of the longer extent of the removed part.

    Returns:
        Crops from top to bottom; none for an empty mask.
    """
    height, width = mask.shape
    step = max(1, -(-max(height, width) // CELLS))
    cells = F.max_pool2d(mask[None, None].float(), step, ceil_mode=True)[0, 0] > 0
    labels = connected_parts(cells)
    groups: list[tuple[Box, list[int]]] = []
    for label in labels[cells].unique().tolist():
        rows, columns = (labels == label).nonzero(as_tuple=True)
        top, left = int(rows.min()) * step, int(columns.min()) * step
        bottom = min((int(rows.max()) + 1) * step, height)
        right = min((int(columns.max()) + 1) * step, width)
        _join(groups, Box(top, left, bottom - top, right - left), [label], side, context)
    crops = []
    for extent, members in sorted(groups, key=lambda group: group[0]):
        box = _placed(extent, _side(extent, side, context), (height, width))
        chosen = torch.isin(labels, torch.tensor(members)) & cells
        whole = chosen.repeat_interleave(step, 0).repeat_interleave(step, 1)[:height, :width]
        crops.append(Crop(box, (mask & whole)[box.window]))
    return crops


def _join(
    groups: list[tuple[Box, list[int]]], extent: Box, members: list[int], side: int, context: float
) -> None:  # fmt: skip
    """Add a part to the groups of crops, joined with each group whose crop need not grow."""
    index = 0
    while index < len(groups):
        other, theirs = groups[index]
        both = extent.around(other)
        if _side(both, side, context) <= max(_side(extent, side, context), _side(other, side, context)):
            extent, members = both, [*members, *theirs]
            del groups[index]
            index = 0
        else:
            index += 1
    groups.append((extent, members))


def _side(extent: Box, side: int, context: float) -> int:
    """Give the side of a crop in pixels."""
    return max(side, round(max(extent.height, extent.width) * (1 + 2 * context)))


def _placed(extent: Box, side: int, size: tuple[int, int]) -> Box:
    """Place a square around an extent inside of the picture; it is cut where the picture is shorter."""
    height, width = min(side, size[0]), min(side, size[1])
    top = min(max(extent.top + (extent.height - height) // 2, 0), size[0] - height)
    left = min(max(extent.left + (extent.width - width) // 2, 0), size[1] - width)
    return Box(top, left, height, width)


def connected_parts(cells: Tensor) -> Tensor:
    """Label the connected parts of a grid, also over corners; `(rows, columns)` of whole numbers.

    Args:
        cells: Cells to label, `(rows, columns)` bool. The others get 0.
    """
    labels = torch.arange(1, cells.numel() + 1, dtype=torch.float32).view(cells.shape) * cells
    while True:
        spread = F.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * cells
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def worked_size(box: Box, side: int) -> tuple[int, int]:
    """Give the height and width at which the model works on a crop: its longer side is the model's."""
    longer = max(box.height, box.width)
    if longer <= side:
        return box.height, box.width
    return max(1, round(box.height * side / longer)), max(1, round(box.width * side / longer))


def pasted(source: Tensor, made: Tensor, own: Tensor, mask_blur: int, radius: float) -> Tensor:
    """Replace the masked part of a crop by the model's output.

    Args:
        source: Original crop, `(1, 3, height, width)` in 0-1.
        made: The model's output, at the model's size.
        own: Masked part, `(height, width)` bool.
        mask_blur: Side of the Gaussian that grows masks at the model's size, in pixels there.
        radius: Radius of the soft edge in pixels of the crop. Beyond three times the radius every pixel is the
            source's.
    """
    size = (source.shape[2], source.shape[3])
    scale = max(size) / max(made.shape[2:])
    grown = grow(own[None], 2 * round((mask_blur * scale - 1) / 2) + 1 if mask_blur else 0)
    large = resized(made, size)
    if radius > 0:
        return blend(source, large, grown, radius)
    return torch.where(grown[:, None].to(large.device), large, source.to(large))


def by_crops(
    source: Tensor, mask: Tensor, side: int, settings: RemovalSettings, blended: float,
    fill: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Fill the masked part of an image crop by crop; later crops see the result of earlier ones.

    The parts of the mask that other crops remove are hidden from a crop, unless nothing else would be left.

    Args:
        source: `(1, 3, height, width)` in 0-1.
        mask: `(height, width)` bool.
        side: Side in pixels of the images that the model draws.
        settings: How wide crops, mask and soft edge are.
        blended: Radius of the soft edge as a share of the crop's shorter side, where the settings leave it open.
        fill: Fills a crop `(1, 3, rows, columns)` where `(1, rows, columns)` bool says.
    """
    left = mask.clone()
    for box, own in plan_crops(mask, side, settings.crop_context):
        part, size = source[:, :, *box.window], worked_size(box, side)
        hole = fitted(left[box.window][None], size)
        made = fill(resized(part, size), fitted(own[None], size) if hole.all() else hole)
        radius = blended * min(box.height, box.width) if settings.blend_radius is None else settings.blend_radius
        after = pasted(part, made.to(part), own, settings.mask_blur, radius)
        source = source.clone()
        source[:, :, *box.window] = after
        left[box.window] &= ~own
    return source


__all__ = ["Box", "Crop", "by_crops", "connected_parts", "pasted", "plan_crops", "worked_size"]
