"""The parts of a large picture that object removal works on, each at the size that the model was made for."""

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
"""Rows and columns, at most, of the grid on which the parts of a mask are told apart."""


class Box(NamedTuple):
    """Some rows and columns of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def around(self, other: Box) -> Box:
        """The smallest box that holds both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Box(top, left, bottom - top, right - left)


class Crop(NamedTuple):
    """A part of a picture around one or several parts of its mask."""

    box: Box
    own: Tensor
    """`(height, width)` bool: what is taken out with this crop; others of the mask may reach into it."""


def plan_crops(mask: Tensor, side: int, context: float) -> list[Crop]:
    """Crops that cover a mask, each a square unless the picture is too short for one.

    A crop has the model's side at least, so that nothing is enlarged, and else leaves a share of the mask's extent on
    every side of it. Parts of a mask share a crop where that does not have to be larger than the larger of their own;
    far ones get crops of their own, which keeps every one of them sharp.

    Args:
        mask: `(height, width)` bool.
        side: Pixels that the model draws along a side.
        context: Surroundings on every side, as a share of the longer extent of what is taken out.

    Returns:
        From top to bottom; none for an empty mask.
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
    """Add a part to the groups, and join it with each whose crop need not grow for it."""
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
    """Pixels along the side of a crop."""
    return max(side, round(max(extent.height, extent.width) * (1 + 2 * context)))


def _placed(extent: Box, side: int, size: tuple[int, int]) -> Box:
    """A square around an extent, moved into the picture, and as short as the picture where that is shorter."""
    height, width = min(side, size[0]), min(side, size[1])
    top = min(max(extent.top + (extent.height - height) // 2, 0), size[0] - height)
    left = min(max(extent.left + (extent.width - width) // 2, 0), size[1] - width)
    return Box(top, left, height, width)


def connected_parts(cells: Tensor) -> Tensor:
    """Label of the connected part that each cell belongs to, also over corners; `(rows, columns)` of whole numbers.

    Args:
        cells: `(rows, columns)` bool. Labels of the others are 0.
    """
    labels = torch.arange(1, cells.numel() + 1, dtype=torch.float32).view(cells.shape) * cells
    while True:
        spread = F.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * cells
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def worked_size(box: Box, side: int) -> tuple[int, int]:
    """Height and width at which the model works on a crop: its longer side is the model's."""
    longer = max(box.height, box.width)
    if longer <= side:
        return box.height, box.width
    return max(1, round(box.height * side / longer)), max(1, round(box.width * side / longer))


def pasted(source: Tensor, made: Tensor, own: Tensor, mask_blur: int, radius: float) -> Tensor:
    """A crop with what the model made in the place of its own part of the mask.

    Args:
        source: The crop as it was, `(1, 3, height, width)` in 0-1.
        made: What the model made of it, at the model's size.
        own: `(height, width)` bool.
        mask_blur: Side of the Gaussian that grows masks at the model's size, in pixels there.
        radius: Of the soft edge, in pixels of the crop; beyond three times that everything is the source's.
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
    """An image with what a mask covers painted anew, crop after crop, each on what the ones before left.

    A crop is painted without the parts of the mask that other crops take out, unless nothing would be left to paint
    from.

    Args:
        source: `(1, 3, height, width)` in 0-1.
        mask: `(height, width)` bool.
        side: Pixels that the model draws along a side.
        settings: How wide crops, mask and soft edge are.
        blended: Radius of the soft edge as a share of the crop's shorter side, where the settings leave it open.
        fill: Paints a crop `(1, 3, rows, columns)` anew where `(1, rows, columns)` bool says.
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
