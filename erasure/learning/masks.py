"""Masks of the things in a picture from the denoiser's attention (AttenCraft, section 3.1 of its paper)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import AttentionSite, Backbone
from erasure.carriers.attention import AttentionController, Layout
from erasure.errors import MaskError, UnsupportedModelError
from erasure.text.words import subject_span

GRIDS = (8, 32)
"""Shorter side in tokens of the attention grids that are read: the coarsest one for cross-attention, which
separates things best, and the finest for self-attention (AttenCraft with Stable Diffusion: 16, 32)."""
NEARNESS = 4.0
"""Weight of positions relative to self-attention in clustering, both scaled to their range."""
LEAST_PLACES = 2
"""Smallest number of grid places of a thing."""
ROUNDS = 30
"""Largest number of rounds of clustering."""
WINDOW = 7
"""Side of the windows in which masks are compared."""


class Maps(NamedTuple):
    """Attention maps of one picture, mean over timesteps."""

    background: Tensor
    """Attention to the start token, which stands for the background, `(rows, columns)` in 0-1."""
    tokens: Tensor
    """Attention to each new token, `(tokens, rows, columns)`."""
    reach: Tensor
    """Self-attention between places, `(places, places)`."""


def attention_layers(backbone: Backbone, size: tuple[int, int]) -> tuple[list[AttentionSite], list[AttentionSite]]:
    """Find the cross-attention at the coarsest grid, and the self-attention at the finest.

    Raises:
        UnsupportedModelError: The denoiser has none, for instance because it uses joint attention.
    """
    sites = backbone.attention_sites()
    sides = {site.name: min(site.grid(*size)) for site in sites}
    finest = max(GRIDS[1], min(sides.values(), default=0))
    fitting = [site for site in sites if GRIDS[0] <= sides[site.name] <= finest]
    cross, own = ([site for site in fitting if site.kind == kind] for kind in ("cross", "self"))
    if not cross or not own:
        raise UnsupportedModelError(
            f"{type(backbone.denoiser).__name__} has no cross-attention and self-attention of {GRIDS[0]} places a "
            "side or more, which tell where things are: give masks (--mask), or take a model with a UNet"
        )
    coarse, fine = min(sides[site.name] for site in cross), max(sides[site.name] for site in own)
    return (
        [site for site in cross if sides[site.name] == coarse], [site for site in own if sides[site.name] == fine]
    )  # fmt: skip


def columns_of(backbone: Backbone, prompt: str, names: Sequence[str]) -> Tensor:
    """Make weights `(text tokens, 1 + names)`: 1 at the start token, and at the vectors of each name in a prompt."""
    run = backbone.token_runs[0]
    weights = torch.zeros(run.tower.max_length, 1 + len(names))
    weights[0, 0] = 1
    for number, name in enumerate(names):
        first, last, _ = subject_span(run.tower, prompt, name)
        weights[first : last + 1, 1 + number] = 1
    return weights


def read_maps(
    backbone: Backbone, clean: Tensor, prompt: str, names: Sequence[str], levels: Sequence[Tensor], noise: Tensor,
    power: int,
) -> Maps:  # fmt: skip
    """Read the denoiser's attention maps of a picture.

    Args:
        backbone: The model.
        clean: Latents of the picture, `(1, channels, h, w)`.
        prompt: Prompt that names everything in the picture.
        names: Name of each map.
        levels: Timesteps at which attention is read.
        noise: Noise to add, shaped as `clean`.
        power: Number of times that self-attention is applied to the maps.
    """
    size = (clean.shape[2], clean.shape[3])
    cross, own = attention_layers(backbone, size)
    control = AttentionController(backbone.denoiser, Layout(size, 1))
    control.capture(columns_of(backbone, prompt, names)[None], cross)
    control.capture_self(own)
    grid = own[0].grid(*size)
    places = grid[0] * grid[1]
    conditioning, single = backbone.encode([prompt]), torch.eye(places, device=clean.device).view(1, places, *grid)
    found: list[Tensor] = []
    reach = torch.zeros(places, places)
    with torch.no_grad(), control:
        for t in levels:
            level = t.to(clean.device).expand(1)
            backbone.predict(backbone.parametrisation.noised(clean, noise, level), level, conditioning)
            each = [F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in control.maps.values()]
            found.append(torch.stack(each).mean(0)[0].float().cpu())
            reach += control.spread(single)[0].flatten(1).T.float().cpu() / len(levels)
    maps = torch.stack(found).mean(0)
    spread = torch.linalg.matrix_power(reach, power)
    squared = torch.stack([ranged(part) ** 2 for part in maps]).flatten(1)
    refined = torch.stack([ranged(part) for part in (squared @ spread.T)]).unflatten(1, grid)
    return Maps(refined[0], refined[1:], spread)


def ranged(values: Tensor) -> Tensor:
    """Scale values to 0-1."""
    least, most = values.min(), values.max()
    return (values - least) / (most - least).clamp_min(1e-12)


def grouped(maps: Maps, count: int, threshold: float) -> Tensor:
    """Find masks of `count` separate things by clustering self-attention, `(count, rows, columns)` bool.

    The foreground is clustered by position and self-attention (k-means, which starts from distant places). Masks are
    sorted from left to right.

    Raises:
        MaskError: There are fewer things in the foreground.
    """
    columns = maps.background.shape[1]
    inside = (1 - maps.background > threshold).flatten()
    places = inside.nonzero()[:, 0]
    if len(places) < LEAST_PLACES * count:
        raise MaskError(
            f"{len(places)} of {len(inside)} places of the picture stand out from its background, too few for {count} "
            "things: give a picture that shows them larger and before a plain background, or masks (--mask)"
        )
    looks = F.normalize(maps.reach[places][:, places], dim=1)
    where = torch.stack([places // columns, places % columns], 1).float() / columns
    features = torch.cat([looks, NEARNESS * where], 1)
    centres = [int((features - features.mean(0)).square().sum(1).argmax())]
    while len(centres) < count:
        centres.append(int(torch.cdist(features, features[centres]).min(1).values.argmax()))
    means, group = features[centres], torch.full((len(places),), -1)
    for _ in range(ROUNDS):
        before, group = group, torch.cdist(features, means).argmin(1)
        if torch.equal(before, group):
            break
        means = torch.stack([features[group == number].mean(0) for number in range(count)])
    order = torch.stack([where[group == number, 1].mean() for number in range(count)]).argsort(stable=True)
    masks = torch.zeros(count, len(inside), dtype=torch.bool)
    masks[order.argsort()[group], places] = True
    return masks.unflatten(1, maps.background.shape)


def border(masks: Tensor) -> float:
    """Measure the longest border between two masks, in sides of a square with the smaller mask's area.

    Two halves of a square have a border of 1.4.

    Args:
        masks: `(tokens, rows, columns)` bool, no two of which share a place.
    """
    worst = 0.0
    for first in range(len(masks)):
        for second in range(first):
            a, b = masks[first], masks[second]
            across = [(a[:, :-1] & b[:, 1:]), (b[:, :-1] & a[:, 1:]), (a[:-1] & b[1:]), (b[:-1] & a[1:])]
            length = sum(int(pair.sum()) for pair in across)
            worst = max(worst, length / float(min(a.sum(), b.sum()).clamp_min(1)) ** 0.5)
    return worst


def in_pixels(masks: Tensor, background: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """Resize masks to the picture, `(tokens, height, width)` bool, with the smoothness of attention.

    Args:
        masks: `(tokens, rows, columns)` bool.
        background: `(rows, columns)` in 0-1.
        threshold: Foreground score, 0 to 1, above which a pixel belongs to a thing.
        size: Height and width.
    """

    def larger(x: Tensor) -> Tensor:
        return F.interpolate(x.float()[None], size, mode="bilinear", align_corners=False)[0]

    things, own = larger(1 - background[None]) > threshold, larger(masks)
    return things & (own.argmax(0, keepdim=True) == torch.arange(len(masks))[:, None, None])


def matched(masks: Tensor, tokens: Tensor, margin: float) -> Tensor:
    """Sort masks by the tokens with the most attention on them, `(tokens, rows, columns)`.

    Args:
        masks: Mask of each thing, `(tokens, rows, columns)` bool.
        tokens: Attention to each token, of the same shape.
        margin: Share by which the best order must be better than the next.

    Raises:
        MaskError: Two orders fit equally well.
    """
    share = tokens.flatten(1) / tokens.flatten(1).sum(1, keepdim=True).clamp_min(1e-12)
    inside = masks.flatten(1).float()
    mass = share @ (inside / inside.sum(1, keepdim=True).clamp_min(1)).T
    orders = list(permutations(range(len(masks))))
    scores = torch.stack([mass[range(len(masks)), order].sum() for order in orders])
    best = scores.sort(descending=True)
    if len(orders) > 1 and best.values[0] < (1 + margin) * best.values[1]:
        raise MaskError(
            "attention does not tell which token is which thing: say what each looks like in words that the model "
            "knows (--like), leave those out so that tokens go from left to right, or give masks (--mask)"
        )
    return masks[list(orders[int(best.indices[0])])]


def assigned(maps: Maps, margin: float) -> Tensor:
    """Make the paper's masks: places where a token's map exceeds all others' and the background's by a margin."""
    every = torch.cat([maps.background[None], maps.tokens])
    best = every.topk(2, 0)
    sure = best.values[0] - best.values[1] > margin
    return torch.stack([sure & (best.indices[0] == 1 + number) for number in range(len(maps.tokens))])


def likeness(first: Tensor, second: Tensor) -> float:
    """Compute the structural similarity (Wang et al. 2004) of two masks `(rows, columns)` in 0-1."""
    a, b = first.float()[None, None], second.float()[None, None]
    side = min(WINDOW, *a.shape[2:])

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, 1)

    count = side * side
    scale = count / (count - 1)
    m, n = mean(a), mean(b)
    va, vb, both = scale * (mean(a * a) - m * m), scale * (mean(b * b) - n * n), scale * (mean(a * b) - m * n)
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * m * n + c1) * (2 * both + c2)) / ((m * m + n * n + c1) * (va + vb + c2))).mean())
