"""Masks with shadows: pixels beside a mask that have the background's colour, only darker.

No network is used. A shadow removes about the same share of every colour, so its pixels are a background colour times
one factor. It touches the thing that throws it, and its colour is not a background colour itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.pipelines.pictures import resized

LONGEST = 256
"""Longer side in pixels at which shadows are searched, at which noise and fine texture hardly matter."""
REACH = 0.5
"""Largest distance of a shadow from the mask, as a share of the square root of the mask's area."""
LIGHT = (0.35, 0.94)
"""Smallest and largest share of the background's light that a shadow leaves."""
NEAR = 0.035
"""Distance of colours in 0-1 that count as the same."""
BINS = 24
"""Number of bins per colour channel by which background colours are separated."""
SHARE = 0.01
"""Smallest share of the surroundings that a background colour covers."""
LEAST = 0.03
"""Smallest size of a shadow as a share of the mask's size."""
EDGE = 2
"""Width in pixels, at the size of the search, of the soft edges of objects and shadows."""


def with_shadows(masks: Tensor, images: Tensor) -> Tensor:
    """Add to masks the shadows that the masked things throw onto their background.

    Args:
        masks: `(images, height, width)` bool.
        images: `(images, 3, height, width)` in 0-1.

    Returns:
        Masks of the same shape. Where no shadow is found, a mask stays as it is.
    """
    size = (images.shape[2], images.shape[3])
    scale = min(1.0, LONGEST / max(size))
    small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    grown = []
    for mask, image in zip(masks, resized(images.float().cpu(), small), strict=True):
        covered = F.adaptive_max_pool2d(mask[None, None].float(), small)[0, 0] > 0
        found = shadow_beside(covered, image)
        large = F.interpolate(found[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0] > 0.5
        whole = mask | large.to(mask.device)
        grown.append(mask if whole.all() else whole)
    return torch.stack(grown) if grown else masks


def shadow_beside(mask: Tensor, image: Tensor) -> Tensor:
    """Find the shadow that touches a mask, `(height, width)` bool.

    Args:
        mask: `(height, width)` bool.
        image: `(3, height, width)` in 0-1.
    """
    nothing = torch.zeros_like(mask)
    if not mask.any() or mask.all():
        return nothing
    reach = max(EDGE, round(REACH * float(mask.sum()) ** 0.5))
    touching, near = dilated(mask, EDGE), dilated(mask, reach)
    palette = background_of(image[:, dilated(mask, 3 * reach) & ~touching])
    if not len(palette):
        return nothing
    colours = image.flatten(1).T  # (pixels, 3)
    light, off = light_between(colours, palette)
    is_background = (torch.cdist(colours, palette) < NEAR).any(1).view(mask.shape)
    dark = ((off < NEAR) & (light > LIGHT[0]) & (light < LIGHT[1])).any(1).view(mask.shape)
    wanted = dark & ~is_background & near & ~mask
    # Lines of one or two pixels are soft edges of objects, which are darker than the background as well.
    core = dilated(~dilated(~wanted, 1), 1) & wanted
    soft = ((off < NEAR) & (light > LIGHT[0]) & (light < 1)).any(1).view(mask.shape)
    # Other things throw shadows too, so each pixel is assigned to the nearer thing.
    others = dilated(~dilated(is_background | soft | touching, 1), 1)
    found = nearer(dilated(touching, 1) & core, dilated(others, EDGE) & core, core)
    found = dilated(found, 1) & wanted
    if found.sum() < LEAST * mask.sum():
        return nothing
    edge = dilated(found, EDGE) & near & (is_background | soft | touching)
    return (found | edge) & ~mask


def light_between(colours: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the factor that best maps each palette colour to each colour, and the remaining distance.

    Args:
        colours: `(colours, 3)` in 0-1.
        palette: `(palette, 3)` in 0-1.

    Returns:
        Factors and distances, `(colours, palette)` each.
    """
    light = colours @ palette.T / palette.square().sum(1).clamp_min(1e-6)
    return light, (colours[:, None] - light[..., None] * palette).norm(dim=-1)


def background_of(pixels: Tensor) -> Tensor:
    """Find the most frequent colours of pixels, without those that are a shadowed version of a more frequent one.

    Args:
        pixels: `(3, pixels)` in 0-1.

    Returns:
        Mean colours, `(colours, 3)`.
    """
    bins = (pixels * (BINS - 1)).round().long()
    keys = (bins[0] * BINS + bins[1]) * BINS + bins[2]
    found, place, counts = keys.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(found), 3).index_add_(0, place, pixels.T) / counts[:, None]
    is_frequent = counts >= max(1, SHARE * pixels.shape[1])
    means, counts = means[is_frequent], counts[is_frequent]
    light, off = light_between(means, means)
    in_shadow = (off < NEAR) & (light > LIGHT[0]) & (light < LIGHT[1]) & (counts > counts[:, None])
    return means[~in_shadow.any(1)]


def nearer(own: Tensor, others: Tensor, allowed: Tensor) -> Tensor:
    """Mark the allowed pixels that are nearer to `own` than to `others` along allowed paths.

    Both regions grow by one pixel per step; ties belong to `own`. All arguments are `(height, width)` bool.
    """
    own, others = own & allowed, others & allowed & ~own
    while True:
        further = dilated(own, 1) & allowed & ~others
        theirs = dilated(others, 1) & allowed & ~further
        if torch.equal(further, own) and torch.equal(theirs, others):
            return own
        own, others = further, theirs


def dilated(mask: Tensor, radius: int) -> Tensor:
    """Grow a mask by a square of a radius in pixels, `(height, width)` bool."""
    return F.max_pool2d(mask[None, None].float(), 2 * radius + 1, 1, radius)[0, 0] > 0


__all__ = ["shadow_beside", "with_shadows"]
