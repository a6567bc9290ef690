"""Whether a thing is in a picture: whether its name improves the denoiser's prediction of the picture.

A denoiser is a classifier (Li et al. 2023, arXiv 2303.16203): with the same noise, the text that describes the picture
gives the smallest error. The score of a text is the share of the error without text that the text removes,
`1 - e(text) / e("")`; it is negative for wrong texts. Attention cannot be used for this, because every word gets some
attention from any picture (on Canvas its maps separate present from absent things hardly better than chance).

A text that names only one of several things also increases the error, because a picture of that thing alone looks
different. With other names, the word is therefore evaluated together with them; without, each part of the picture is
evaluated by itself and compared with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone
from erasure.pipelines.inversion import noise_levels
from erasure.pipelines.latents import ImagesMixin
from erasure.pipelines.pictures import resized

STEPS, NOISE = 5, 0.8
"""Number of steps of the schedule, and share of them that is evaluated, without the extremes of much and little
noise."""
ROWS = 4
"""Number of texts and pictures that are evaluated at once."""
REST, APART = 0.5, 0.1
"""Weight of the difference between a part's score and the score of the rest of the picture, and the difference it
needs: a word that the denoiser does not know scores slightly above no word everywhere."""
MARGIN = 1.15
"""Size of the window around a part, relative to the part's size."""
GRID = 128
"""Largest number of rows and columns at which parts are searched."""
LEAST, LONG = 0.02, 1.35
"""Smallest size of a part as a share of the picture, and ratio of length to width above which a part may be two
things."""


class PresenceMixin(ImagesMixin):
    """Mixin for a stock pipeline class."""

    def look(
        self, source: Tensor, latents: Tensor, things: Tensor, phrases: Sequence[str], words: int, least: float,
        backbone: Backbone,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Score whether words are in pictures, and find their places where the scores determine them.

        Args:
            source: `(images, 3, height, width)` in 0-1.
            latents: Latents of the images.
            things: Foreground, `(images, height, width)` bool.
            phrases: Names with articles: those of the words, then those of other things that are there.
            words: Number of the words.
            least: Smallest score with which a word counts as found.
            backbone: Of the pipeline.

        Returns:
            Scores `(images, words)`, and places `(images, words, height, width)` bool, which are empty where names
            have to be separated by other means.
            names have to be told apart by other means.
        """
        ask = Asked(backbone, latents)
        empty = ask.errors("")
        scores = torch.stack([1 - ask.errors(word) / empty for word in phrases[:words]], 1)
        # If only one word is searched and found, it covers the whole foreground.
        places = things[:, None] & (scores >= least)[:, :, None, None]
        first = scores.argmax(1, keepdim=True) == torch.arange(words)
        places &= first[:, :, None, None]
        if len(phrases) > 1:
            named = ask.least_error(phrases)
            for column in range(words):
                rest = ask.least_error([name for name in phrases if name != phrases[column]])
                together = torch.minimum(1 - named / empty, 1 - named / rest)
                places[:, column] &= (scores[:, column] > together)[:, None, None]
                scores[:, column] = torch.maximum(scores[:, column], together)
            return scores, places
        for row in (scores[:, 0] < least).nonzero()[:, 0].tolist():
            score, part = self._in_parts(source[row : row + 1], things[row], phrases[0], backbone)
            if score > scores[row, 0]:
                scores[row, 0], places[row, 0] = score, part
        return scores, places

    def _in_parts(self, source: Tensor, things: Tensor, phrase: str, backbone: Backbone) -> tuple[float, Tensor]:
        """Score the part of a picture that a phrase fits best, relative to the rest, and give the part."""
        parts = split(things)
        if not parts:
            return -float("inf"), torch.zeros_like(things)
        ask = Asked(backbone, self.encode_images(torch.cat([window(source, part) for part in parts])))
        gains = 1 - ask.errors(phrase) / ask.errors("")
        best = int(gains.argmax())
        apart = [float(gain) for part, gain in zip(parts, gains, strict=True) if not (part & parts[best]).any()]
        gain = float(gains[best])
        if not apart:
            return gain, parts[best]
        above = gain - max(apart)
        return min(gain + REST * above, above - APART), parts[best]


class Asked:
    """Pictures for which a denoiser measures how well texts fit.

    Args:
        backbone: Of the model.
        latents: Latents of the pictures, `(images, channels, h, w)`.
    """

    def __init__(self, backbone: Backbone, latents: Tensor) -> None:
        self.backbone, self.latents = backbone, latents
        self.levels = noise_levels(backbone, STEPS, NOISE, "finding things by words")
        # The same noise for every picture and text.
        shape, seed = (1, *latents.shape[1:]), torch.Generator("cpu").manual_seed(0)
        self.noise = randn_tensor(shape, seed, latents.device, latents.dtype)

    def least_error(self, names: Sequence[str]) -> Tensor:
        """Compute the error `(images,)` of a text with several names, in the better of two orders."""
        orders = [list(names), list(names)[::-1]][: len(names)]
        found = [self.errors(" and ".join(order)) for order in orders]
        return torch.stack(found or [self.errors("")]).amin(0)

    def errors(self, text: str) -> Tensor:
        """Compute the denoiser's mean squared error with a text, over timesteps, `(images,)`."""
        conditioning, kind = self.backbone.encode([text]), self.backbone.parametrisation
        found = []
        for clean in self.latents.split(ROWS):
            noise, rows = self.noise.expand_as(clean), conditioning.repeated(len(clean))
            each = []
            for level in self.levels:
                t = level.expand(len(clean))
                predicted = self.backbone.predict(kind.noised(clean, noise, t), t, rows)
                wanted = kind.target(clean, noise, t).to(predicted.device)
                each.append((predicted.float() - wanted.float()).square().mean((1, 2, 3)).cpu())
            found.append(torch.stack(each).mean(0))
        return torch.cat(found)


def split(things: Tensor) -> list[Tensor]:
    """Split a mask `(height, width)` bool into connected parts, and add the halves of long parts."""
    height, width = things.shape
    step = -(-max(height, width) // GRID)
    if step > 1:
        parts = [part.repeat_interleave(step, 0).repeat_interleave(step, 1) for part in split(things[::step, ::step])]
        return [part[:height, :width] & things for part in parts if (part[:height, :width] & things).any()]
    parts = []
    for part in components(things):
        if part.sum() < LEAST * part.numel():
            continue
        parts.append(part)
        rows, columns = (part.any(axis).nonzero()[:, 0] for axis in (1, 0))
        spans = (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
        if max(spans) < LONG * min(spans):
            continue
        along = 0 if spans[0] > spans[1] else 1
        profile, start = part.sum(1 - along), int((rows, columns)[along][0])
        first, last = start + int(0.3 * spans[along]), start + int(0.7 * spans[along]) + 1
        # The cut is at the thinnest place, and of several at the middle one.
        cut = min(range(first, last), key=lambda at: (int(profile[at]), abs(at - start - spans[along] / 2)))
        ahead = (torch.arange(part.shape[along]) < cut).view((-1, 1) if along == 0 else (1, -1))
        parts += [part & ahead, part & ~ahead]
    return parts


def components(mask: Tensor) -> list[Tensor]:
    """Split a mask `(height, width)` bool into parts whose pixels touch along a side."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float64).view(mask.shape) * mask
    while True:
        spread = [
            F.max_pool2d(labels[None], size, 1, around)[0] for size, around in (((3, 1), (1, 0)), ((1, 3), (0, 1)))
        ]
        grown = torch.maximum(*spread) * mask
        if torch.equal(grown, labels):
            return [labels == label for label in labels.unique().tolist() if label]
        labels = grown


def window(source: Tensor, part: Tensor) -> Tensor:
    """Zoom a picture `(1, 3, height, width)` to a part of it, keeping proportions and size."""
    height, width = part.shape
    rows, columns = (part.any(axis).nonzero()[:, 0] for axis in (1, 0))
    spans = (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
    share = min(1.0, MARGIN * max(spans[0] / height, spans[1] / width))
    size = (max(1, round(share * height)), max(1, round(share * width)))
    middle = ((int(rows[0]) + int(rows[-1]) + 1) / 2, (int(columns[0]) + int(columns[-1]) + 1) / 2)
    top, left = (
        min(max(round(at - own / 2), 0), whole - own)
        for at, own, whole in zip(middle, size, (height, width), strict=True)
    )
    return resized(source[:, :, top : top + size[0], left : left + size[1]], (height, width))
