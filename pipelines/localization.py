"""Masks of named things from the attention that a denoiser pays to their words, without a segmentation model.

After the localiser of AttenCraft (Shentu et al. 2024, arXiv 2405.17965): cross-attention maps, with the start token's
as that of the background, are refined by self-attention and compared. Two things differ, both measured on Canvas:
every name has a prompt of its own, because in a common one each word's attention falls on its neighbours' things as
well; and its map counts the end of the prompt and the padding too, which have read the name and draw most attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from erasure.backbones import AttentionSite, TextTower, attention_sites, text_towers
from erasure.carriers.attention import AttentionController, Layout
from erasure.errors import MaskError
from erasure.guards import unguarded
from erasure.interop.protocols import Pipeline, as_pipeline
from erasure.options import Count, CountOrZero, Options, ZeroToOne
from erasure.pipelines.attention_losses import ranged
from erasure.pipelines.mixin import in_one_state
from erasure.pipelines.pictures import Pictures, cropped
from erasure.pipelines.presence import PresenceMixin
from erasure.pipelines.prompts import texts_of

GRIDS = (8, 32)
"""Least and greatest shorter side of the token grids whose attention is read."""


@dataclass(frozen=True, kw_only=True)
class LocalizationSettings(Options):
    """How things are found. Values without a source are those that did best on Canvas."""

    name: ClassVar[str] = "localisation"

    num_inference_steps: Count = 10
    """Steps of the schedule, of which the last `strength` are looked at."""
    strength: Annotated[float, Gt(0), Le(1)] = 0.3
    """How much noise the image has at first, as a share of the schedule; maps are averaged from there to none."""
    power: CountOrZero = 4
    """How often self-attention is applied to the maps (AttenCraft: 4)."""
    threshold: ZeroToOne = 0.5
    """What a map, between 0 and 1 over the image, must reach on what is named."""
    smoothing: Annotated[float, Gt(0), Le(1)] = 0.3
    """Width of the Gaussian over which names are told apart, as a share of the grid's side."""
    presence: Annotated[float, Ge(-1000), Le(1)] = 0.06
    """What the score of a word must reach for it to count as found, see `erasure.pipelines.presence`. It was chosen on
    half of Canvas' objects, so that at most 3 of 100 absent words are found, and measured on the other half."""


class Localization(NamedTuple):
    """Where things are."""

    masks: Tensor
    """`(images, names, height, width)` bool, on the CPU: first the words, then the others."""
    scores: Tensor
    """The same shape, 0-1: how much of each pixel's attention a name draws, over the greatest of the image."""
    images: Tensor
    """`(images, 3, height, width)` in 0-1: what was looked at."""
    names: tuple[str, ...] = ()
    """Words that were looked for, in the order of the masks."""
    presence: Tensor | None = None
    """`(images, words)`: how surely each word is in the picture at all; the others are taken for granted."""
    least: float = 0.0
    """Least `presence` with which a word counts as found."""

    def of_words(self) -> Tensor:
        """Where any of the words is, `(images, height, width)` bool.

        Raises:
            MaskError: A word is not in a picture, as far as the model can tell.
        """
        if self.presence is None:
            return self.masks.any(1)
        count = self.presence.shape[1]
        for row, scores in enumerate(self.presence.tolist()):
            for column, (word, score) in enumerate(zip(self.names[:count], scores, strict=True)):
                if score < self.least or not self.masks[row, column].any():
                    where = "the image" if len(self.masks) == 1 else f"image {row}"
                    raise MaskError(
                        f"{word!r} is not found in {where}: its score is {score:.2f}, wanted: {self.least:.2f} and a "
                        "place of its own. Name what else is there (others=, --others), or draw a mask"
                    )
        return self.masks[:, :count].any(1)


class LocalizationMixin(PresenceMixin):
    """Put ahead of a stock inpainting pipeline, whose loop walks through an image's noise levels."""

    @in_one_state
    @torch.no_grad()
    def localize(
        self,
        image: Pictures,
        words: str | Sequence[str],
        *,
        others: str | Sequence[str] = (),
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Localization:
        """Find what words name in images.

        Args:
            image: One image or several of one size, as `ObjectRemovalMixin.__call__` takes them.
            words: What to find, in every image; each gets a mask.
            others: What else is there: a pixel belongs to one name only, so the masks get surer the more is named.
            generator: Of the noise; seed 0 when left out.
            **options: See `LocalizationSettings`.

        Returns:
            A mask for every name, whether it is there or not, and how surely each word is: `of_words` refuses those
            that are not.

        Raises:
            MaskError: A name is empty, or the images do not fit; see `read_images`.
            OptionError: There is no word, or something that is no text.
        """
        settings = LocalizationSettings(**options)
        wanted, beside = texts_of("words", words), texts_of("others", others) if others else []
        names = [*wanted, *beside]
        source = self.read_images(image)
        with unguarded():
            # Nothing is drawn from it.
            latents = self.encode_images(source)
        generator = torch.Generator("cpu").manual_seed(0) if generator is None else generator
        state = generator.get_state()
        raw, refined = [], []
        for name in names:
            generator.set_state(state)  # the same noise for all names
            maps = self._read_maps(latents, name, settings, generator)
            raw.append(maps[0])
            refined.append(maps[1])
        size, side = (source.shape[2], source.shape[3]), as_pipeline(self).vae_scale_factor
        whole = (latents.shape[2] * side, latents.shape[3] * side)
        things = ranged(1 - torch.stack(refined, 1)[:, :, 1].mean(1, keepdim=True))
        chosen = told_apart(torch.stack(raw, 1)[:, :, 0], things, settings)
        large, own = (
            cropped(F.interpolate(part, whole, mode="bilinear", align_corners=False), size)
            for part in (things, chosen)
        )
        inside = large > settings.threshold
        phrases = [describe(text_towers(as_pipeline(self))[0], name)[0] for name in names]
        with unguarded():
            presence, places = self.look(source, latents, inside[:, 0], phrases, len(wanted), settings.presence)
        masks = inside & (own > 0)
        # A place that is certain belongs to its word alone.
        masks &= ~places.any(1, keepdim=True)
        found = places.any((2, 3), keepdim=True)
        masks[:, : len(wanted)] = torch.where(found, places, masks[:, : len(wanted)])
        scores = torch.where(masks | ~inside, large, 0.0)
        return Localization(masks, scores, source, tuple(names), presence, settings.presence)

    def _read_maps(
        self, latents: Tensor, name: str, settings: LocalizationSettings, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mean maps `(images, 2, rows, columns)` of a name and of the start token: as they are, and refined."""
        pipe = as_pipeline(self)
        tower = text_towers(pipe)[0]
        prompt, begins = describe(tower, name)
        weights = torch.zeros(1, tower.max_length, 2)
        weights[:, begins:, 0] = 1
        weights[:, 0, 1] = 1
        count, size = len(latents), (latents.shape[2], latents.shape[3])
        cross, own = localization_sites(pipe.unet, size)
        control = AttentionController(pipe.unet, Layout(size, count))
        control.capture(weights.expand(count, -1, -1), cross)
        control.capture_self(own)
        raw: list[Tensor] = []
        refined: list[Tensor] = []

        def keep(pipe: Pipeline, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            grid = own[0].grid(*size)
            each = [F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in control.maps.values()]
            maps = torch.stack(each).mean(0)
            raw.append(maps.cpu())
            for _ in range(settings.power):
                maps = control.spread(maps)
            refined.append(maps.float().cpu())
            return tensors

        side = pipe.vae_scale_factor
        with control:
            # An empty mask: the loop hands the denoiser the image itself, at one noise level after the other.
            super().__call__(  # type: ignore[misc]
                prompt=[prompt] * count, image=latents, masked_image_latents=latents,
                mask_image=torch.zeros(count, 1, size[0] * side, size[1] * side), height=size[0] * side,
                width=size[1] * side, num_inference_steps=settings.num_inference_steps, strength=settings.strength,
                guidance_scale=1.0, generator=generator, output_type="latent", callback_on_step_end=keep,
                callback_on_step_end_tensor_inputs=["latents"],
            )  # fmt: skip
        return torch.stack(raw).mean(0), torch.stack(refined).mean(0)


def describe(tower: TextTower, name: str) -> tuple[str, int]:
    """A prompt with a name in it, and the position of the name's first token.

    Raises:
        MaskError: The name is empty.
    """
    words = name.split()
    article = words[:1] if words[:1] and words[0].lower() in ("a", "an", "the") else []
    noun = words[len(article) :]
    if not noun:
        raise MaskError(f"{name!r} names nothing: say what to find, for instance 'cat'")
    article = article or ["an" if noun[0][0].lower() in "aeiou" else "a"]
    return " ".join([*article, *noun]), tower.leading + len(tower.word_ids(article[0]))


def localization_sites(
    denoiser: nn.Module, latent_size: tuple[int, int]
) -> tuple[list[AttentionSite], list[AttentionSite]]:
    """The decoder's cross-attention at grids of `GRIDS`, and its self-attention at the finest of them.

    Raises:
        MaskError: It has none at such a grid.
    """
    decoder = [site for site in attention_sites(denoiser) if site.in_decoder]
    fitting = [site for site in decoder if GRIDS[0] <= min(site.grid(*latent_size)) <= GRIDS[1]]
    cross = [site for site in fitting if site.kind == "cross"]
    own = [site for site in fitting if site.kind == "self"]
    if not cross or not own:
        raise MaskError(
            f"no attention layer of the decoder has a grid of {GRIDS[0]} to {GRIDS[1]} tokens a side for a latent of "
            f"{latent_size[1]}x{latent_size[0]}: use images nearer to the size that the model was made for"
        )
    finest = min(site.downsampling for site in own)
    return cross, [site for site in own if site.downsampling == finest]


def told_apart(maps: Tensor, things: Tensor, settings: LocalizationSettings) -> Tensor:
    """Positive where a name draws more than every other, `(images, names, rows, columns)`.

    Names draw unlike amounts of attention all over, so each map is taken relative to its mean over what is no
    background; and neighbours vote, because no object is one token large.

    Args:
        maps: The names' maps, `(images, names, rows, columns)`.
        things: `(images, 1, rows, columns)` in 0-1: how surely there is no background.
        settings: See `LocalizationSettings`.
    """
    if maps.shape[1] == 1:
        return torch.ones_like(maps)
    inside = (things > settings.threshold).float()
    sigma = settings.smoothing * min(maps.shape[2:])
    side = 2 * min(round(3 * sigma), min(maps.shape[2:]) - 1) + 1
    blur = lambda x: gaussian_blur(x, [side, side], [sigma, sigma])  # noqa: E731
    smooth = blur(maps * inside) / blur(inside).clamp_min(1e-3)
    smooth = smooth - (smooth * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp_min(1)
    best, order = smooth.topk(2, dim=1)
    rival = torch.where(order[:, :1] == torch.arange(maps.shape[1])[None, :, None, None], best[:, 1:], best[:, :1])
    return smooth - rival


__all__ = ["Localization", "LocalizationMixin", "LocalizationSettings", "localization_sites"]
