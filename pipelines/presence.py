"""Whether a thing is in a picture at all: whether the denoiser predicts the picture better when it is told the thing.

A denoiser is a classifier (Li et al. 2023, arXiv 2303.16203): at one and the same noise, the text that says what is
there gives the smallest error. The score of a text is the share of the error without any text that it takes away,
`1 - e(text) / e("")`, negative where the text misleads. Attention does not tell: every word draws some to whatever is
there (on Canvas its maps order present and absent things hardly better than chance).

A text that names one of several things misleads too, because a picture of that thing alone looks different. So with
other names beside it the word is asked for together with them; and without, each part of the picture is looked at by
itself, and compared with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.interop import hooks, paths
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Arguments, Denoiser, Pipeline, Scheduler, as_pipeline
from erasure.pipelines.inversion import check_levels, forwards
from erasure.pipelines.latents import ImagesMixin
from erasure.pipelines.pictures import resized

STEPS, NOISE = 5, 0.8
"""Steps of the schedule, and the share of them that is asked at: from much noise to little, without the extremes."""
ROWS = 4
"""Texts and pictures that are asked about at once."""
REST, APART = 0.5, 0.1
"""Weight of what a part's score is above that of the rest of the picture, and how far above it has to be: a word that
the denoiser does not know fits everything alike, and a little better than no word."""
MARGIN = 1.15
"""Size of the window around a part, times the part's."""
GRID = 128
"""Most rows and columns at which parts are looked for."""
LEAST, LONG = 0.02, 1.35
"""Least size of a part as a share of the picture, and how much longer than wide one is that may be two."""
_LISTEN = "erasure_presence"


class PresenceMixin(ImagesMixin):
    """Put ahead of a stock inpainting pipeline, whose loop walks through an image's noise levels."""

    def look(
        self, source: Tensor, latents: Tensor, things: Tensor, phrases: Sequence[str], words: int, least: float
    ) -> tuple[Tensor, Tensor]:
        """Score how surely words are in pictures, and where, as far as that follows.

        Args:
            source: `(images, 3, height, width)` in 0-1.
            latents: The same as latents.
            things: `(images, height, width)` bool: what is no background.
            phrases: What is looked for, with an article each: the words, then other things that are there.
            words: Number of the words.
            least: Score from which a word counts as found.

        Returns:
            Scores `(images, words)`, and places `(images, words, height, width)` bool, which cover nothing where the
            names have to be told apart by other means.
        """
        empty = self._errors(latents, [""] * len(latents))
        scores = torch.stack([1 - self._errors(latents, [word] * len(latents)) / empty for word in phrases[:words]], 1)
        # Nothing but the word is there: it is wherever anything is.
        places = things[:, None] & (scores >= least)[:, :, None, None]
        first = scores.argmax(1, keepdim=True) == torch.arange(words)
        places &= first[:, :, None, None]
        if len(phrases) > 1:
            named = self._least_error(latents, phrases)
            for column in range(words):
                rest = self._least_error(latents, [name for name in phrases if name != phrases[column]])
                together = torch.minimum(1 - named / empty, 1 - named / rest)
                places[:, column] &= (scores[:, column] > together)[:, None, None]
                scores[:, column] = torch.maximum(scores[:, column], together)
            return scores, places
        for row in (scores[:, 0] < least).nonzero()[:, 0].tolist():
            score, part = self._in_parts(source[row : row + 1], things[row], phrases[0])
            if score > scores[row, 0]:
                scores[row, 0], places[row, 0] = score, part
        return scores, places

    def _least_error(self, latents: Tensor, names: Sequence[str]) -> Tensor:
        """Error `(images,)` of a text with several names, in the better of two orders."""
        orders = [list(names), list(names)[::-1]][: len(names)]
        found = [self._errors(latents, [" and ".join(order)] * len(latents)) for order in orders]
        return torch.stack(found or [self._errors(latents, [""] * len(latents))]).amin(0)

    def _in_parts(self, source: Tensor, things: Tensor, phrase: str) -> tuple[float, Tensor]:
        """The score of the part of a picture that a phrase fits best, compared with the rest, and the part."""
        parts = split(things)
        if not parts:
            return -float("inf"), torch.zeros_like(things)
        windows = torch.cat([window(source, part) for part in parts])
        latents = self.encode_images(windows)
        gains = 1 - self._errors(latents, [phrase] * len(parts)) / self._errors(latents, [""] * len(parts))
        best = int(gains.argmax())
        apart = [float(gain) for part, gain in zip(parts, gains, strict=True) if not (part & parts[best]).any()]
        gain = float(gains[best])
        if not apart:
            return gain, parts[best]
        above = gain - max(apart)
        return min(gain + REST * above, above - APART), parts[best]

    def _errors(self, latents: Tensor, texts: Sequence[str]) -> Tensor:
        """Mean squared error of the denoiser on latents `(rows, channels, h, w)`, told a text each, `(rows,)`."""
        pipe = as_pipeline(self)
        own = pipe.scheduler
        check_levels(own, "finding things by words")
        pipe.scheduler = cast(Scheduler, forwards(own))
        try:
            chunks = [slice(start, start + ROWS) for start in range(0, len(texts), ROWS)]
            return torch.cat([self._listen(latents[chunk], list(texts[chunk])) for chunk in chunks])
        finally:
            pipe.scheduler = own

    def _listen(self, latents: Tensor, texts: list[str]) -> Tensor:
        pipe, side = as_pipeline(self), as_pipeline(self).vae_scale_factor
        listener = _Listen(latents, pipe.scheduler)
        count, height, width = len(latents), latents.shape[2] * side, latents.shape[3] * side

        def put_back(pipe: Pipeline, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            # Also where the loop does not, with an inpainting UNet.
            left = pipe.scheduler.timesteps[-pipe.num_timesteps :][index + 1 : index + 2]
            if len(left):
                tensors["latents"] = listener.noised(left[0]).to(tensors["latents"])
            return tensors

        with hooks.hooked(paths.uncompiled(pipe.unet), listener, _LISTEN):
            super().__call__(  # type: ignore[misc]
                prompt=texts, image=latents, masked_image_latents=latents,
                mask_image=torch.zeros(count, 1, height, width), height=height, width=width,
                num_inference_steps=STEPS, strength=NOISE, guidance_scale=1.0, output_type="latent",
                # The same noise for every picture and text.
                generator=[torch.Generator("cpu").manual_seed(0) for _ in texts],
                callback_on_step_end=put_back, callback_on_step_end_tensor_inputs=["latents"],
            )  # fmt: skip
        return torch.stack(listener.errors).mean(0)


class _Listen(ModelHook):
    """On the denoiser: compares what it predicts with what it should have, given the clean latents."""

    def __init__(self, clean: Tensor, scheduler: Scheduler) -> None:
        super().__init__()
        self.clean, self.scheduler = clean.float().cpu(), scheduler
        self.errors: list[Tensor] = []
        self.noise: Tensor | None = None
        self.level = torch.zeros(())

    def _shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        cumulative = self.scheduler.alphas_cumprod[int(t)].float().cpu()
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def noised(self, t: Tensor) -> Tensor:
        """The clean latents at a noise level."""
        assert self.noise is not None
        signal, spread = self._shares(t)
        return signal * self.clean + spread * self.noise

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Take note of the noise level, and of the noise at the first."""
        sample, self.level = args[0], torch.as_tensor(args[1]).flatten()[0].cpu()
        if self.noise is None:
            signal, spread = self._shares(self.level)
            self.noise = (sample[:, : self.clean.shape[1]].float().cpu() - signal * self.clean) / spread
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take note of the error."""
        predicted = (output[0] if isinstance(output, tuple) else output.sample).float().cpu()
        assert self.noise is not None
        signal, spread = self._shares(self.level)
        kind = cast(Denoiser, self.scheduler).config.prediction_type
        target = {
            "epsilon": self.noise, "v_prediction": signal * self.noise - spread * self.clean, "sample": self.clean,
        }[kind]  # fmt: skip
        self.errors.append((predicted - target).square().mean((1, 2, 3)))
        return output


def split(things: Tensor) -> list[Tensor]:
    """The parts of a mask `(height, width)` bool that hang together, and the halves of long ones besides."""
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
        # The thinnest place, and of several the one in the middle.
        cut = min(range(first, last), key=lambda at: (int(profile[at]), abs(at - start - spans[along] / 2)))
        ahead = (torch.arange(part.shape[along]) < cut).view((-1, 1) if along == 0 else (1, -1))
        parts += [part & ahead, part & ~ahead]
    return parts


def components(mask: Tensor) -> list[Tensor]:
    """The parts of a mask `(height, width)` bool whose pixels touch along a side."""
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
    """A picture `(1, 3, height, width)` zoomed to a part of it, with its proportions and size."""
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
