"""Masks of named things from a denoiser's attention to their words, without a segmentation model.

This follows the localiser of AttenCraft (Shentu et al. 2024, arXiv 2405.17965): the start token's cross-attention,
refined by self-attention, gives the background, and the names' cross-attention, all in one prompt, assigns the rest.
Three additions were measured on Canvas: names are used in two orders, because attention to a word also depends on its
position in the prompt; maps are compared relative to their means and together with neighbouring tokens; and masks
follow the image's edges, because a token of the finest grid is many pixels wide.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from erasure.backbones import AttentionSite, Backbone, TextTower, attention_sites, backbone_for
from erasure.carriers.attention import AttentionController, Layout
from erasure.errors import ExperimentalWarning, MaskError
from erasure.guards import unguarded
from erasure.options import Count, CountOrZero, Options, ZeroToOne
from erasure.pipelines.attention_losses import ranged
from erasure.pipelines.inversion import noise_levels
from erasure.pipelines.mixin import in_one_state
from erasure.pipelines.pictures import Pictures, cropped, padded
from erasure.pipelines.presence import PresenceMixin
from erasure.pipelines.prompts import texts_of
from erasure.world import World

GRIDS = (8, 32)
"""Shorter side in tokens of the attention grids that are read: the coarsest grid of the decoder for
cross-attention, which separates things best, and the finest for self-attention (AttenCraft with Stable Diffusion:
16, 32)."""
DETAIL = 4
"""Largest number of rows and columns into which a token is divided to follow the image's edges."""
EDGE = 1e-4
"""Variance of colours in 0-1 that counts as an edge."""

_SAID: set[str] = set()
"""Names of the experiments of which this process has warned."""


@dataclass(frozen=True, kw_only=True)
class LocalizationSettings(Options):
    """Settings for finding things. Values without a source are those that did best on Canvas."""

    name: ClassVar[str] = "localisation"

    num_inference_steps: Count = 10
    """Number of steps of the schedule, of which the last share `strength` is used."""
    strength: Annotated[float, Gt(0), Le(1)] = 0.3
    """Initial noise of the image, as a share of the schedule, 0 to 1; maps are averaged over the steps from there
    on."""
    power: CountOrZero = 4
    """Number of times that self-attention is applied to the maps (AttenCraft: 4)."""
    threshold: ZeroToOne = 0.5
    """Value, 0 to 1, above which a map covers the named things."""
    smoothing: Annotated[float, Gt(0), Le(1)] = 0.3
    """Width of the Gaussian by which maps are smoothed before names are compared, as a share of the grid's side."""
    edge_radius: CountOrZero = 2
    """Radius in tokens of the window around a pixel whose colours decide where a map's edge is; 0 leaves maps
    smooth."""
    presence: Annotated[float, Ge(-1000), Le(1)] = 0.06
    """Score that a word needs to count as found, see `erasure.pipelines.presence`. The default was chosen on half
    of Canvas' objects so that at most 3 of 100 absent words are found, and measured on the other half."""
    max_sequence_length: Count | None = None
    """Number of tokens to which prompts are padded for T5; the model's or pipeline's own number when left out.
    CLIP's number is fixed."""


class Localization(NamedTuple):
    """Masks and scores of things."""

    masks: Tensor
    """Masks, first of the words and then of the others, `(images, names, height, width)` bool on the CPU."""
    scores: Tensor
    """Scores of each pixel in 0-1, in the shape of the masks: a name's attention relative to the image's maximum."""
    images: Tensor
    """The searched images, `(images, 3, height, width)` in 0-1."""
    names: tuple[str, ...] = ()
    """Words that were searched, in the order of the masks."""
    presence: Tensor | None = None
    """Scores that each word is in the picture, `(images, words)`; `others` are assumed to be there."""
    least: float = 0.0
    """Smallest `presence` with which a word counts as found."""

    def of_words(self) -> Tensor:
        """Combine the words' masks, `(images, height, width)` bool.

        Raises:
            MaskError: A word was not found in a picture.
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
    """Mixin for a stock pipeline class."""

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
        """Find the things that words name in images.

        Args:
            image: One image or several of one size, as `ObjectRemovalMixin.__call__` takes them.
            words: Names of the things to find in every image; each gets a mask.
            others: Names of other things in the image. A pixel belongs to one name only, so more names give better
                masks.
            generator: Random generator of the noise; seed 0 when left out.
            **options: See `LocalizationSettings`.

        Returns:
            A mask for every name, whether the thing is there or not, and a score that each word is there; `of_words`
            refuses words that are not.
            that are not.

        Raises:
            MaskError: A name is empty, one prompt has no room for all names, or the images do not fit; see
                `read_images`.
            OptionError: There is no word, or a word is not text.
        """
        settings = LocalizationSettings(**options)
        wanted, beside = texts_of("words", words), texts_of("others", others) if others else []
        names = [*wanted, *beside]
        source = self.read_images(image)
        generator = torch.Generator("cpu").manual_seed(0) if generator is None else generator
        with unguarded():
            # Nothing is drawn from it.
            found = self._found(source, names, len(wanted), settings, generator)
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return found

    def _found(
        self, source: Tensor, names: Sequence[str], words: int, settings: LocalizationSettings,
        generator: torch.Generator,
    ) -> Localization:  # fmt: skip
        """Find the things of names, of which the first `words` are searched; see `localize`."""
        latents = self.encode_images(source)
        factor = self._backbone.latents.factor
        size = (factor * latents.shape[2], factor * latents.shape[3])
        pipe = self._backbone.pipe
        length = settings.max_sequence_length or World.of(pipe).text_length
        backbone = backbone_for(pipe, size=size, length=length)
        if any(site.kind == "joint" for site in backbone.attention_sites()):
            say_experimental(f"finding things with {type(backbone.denoiser).__name__}")
        state = generator.get_state()
        maps = []
        for order in ([*range(len(names))], [*range(len(names))][::-1])[: len(names)]:
            generator.set_state(state)  # the same noise for both orders
            found = self._read_maps(backbone, latents, [names[at] for at in order], settings, generator)
            maps.append(found[:, [0, *(1 + order.index(at) for at in range(len(names)))]])
        mean = torch.stack(maps).mean(0)
        things = ranged(1 - mean[:, :1])
        drawn = comparable(mean[:, 1:], things, settings)
        blurred, refined = self._in_pixels(source, things, drawn, settings)
        large = refined.sum(1, keepdim=True).clamp(0, 1)
        inside = large > settings.threshold
        phrases = [" ".join(describe(name)) for name in names]
        parts = blurred[:, 0] > settings.threshold
        presence, places = self.look(source, latents, parts, phrases, words, settings.presence, backbone)
        places &= inside
        masks = inside & belongs(refined)
        # A place that `presence` has found belongs to that word only.
        masks &= ~places.any(1, keepdim=True)
        is_placed = places.any((2, 3), keepdim=True)
        masks[:, :words] = torch.where(is_placed, places, masks[:, :words])
        scores = torch.where(masks | ~inside, large, 0.0)
        return Localization(masks, scores, source, tuple(names), presence, settings.presence)

    def _read_maps(
        self, backbone: Backbone, latents: Tensor, names: Sequence[str], settings: LocalizationSettings,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """Compute mean maps `(images, 1 + names, rows, columns)`: refined background, and plain maps of the names.

        In UNets the start token gives the background. Joint attention has no such token, so the background is where
        names get little of the attention to text.
        """
        count, size = len(latents), (latents.shape[2], latents.shape[3])
        cross, own = localization_sites(backbone.denoiser, size)
        is_joint = cross[0].kind == "joint"
        prompt, weights = name_weights(backbone, names)
        conditioning = backbone.encode([prompt])
        weights = F.pad(weights, (0, 0, 0, conditioning.tokens.shape[1] - weights.shape[1]))
        # The first map is attention to all of the text in joint attention, and to the start token in UNets.
        weights[:, slice(None) if is_joint else slice(1), 0] = 1
        control = AttentionController(backbone.denoiser, Layout(size, count))
        control.capture(weights.expand(count, -1, -1), cross)
        control.capture_self(own)
        noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        found: list[Tensor] = []
        with control:
            for level in noise_levels(backbone, settings.num_inference_steps, settings.strength, "finding things"):
                t = level.expand(count)
                backbone.predict(backbone.parametrisation.noised(latents, noise, t), t, conditioning.repeated(count))
                grid = own[0].grid(*size)
                each = [F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in control.maps.values()]
                maps = torch.stack(each).mean(0)
                if is_joint:
                    maps[:, 1:] /= maps[:, :1]
                    maps[:, :1] = -maps[:, 1:].sum(1, keepdim=True)
                start = maps[:, :1]
                for _ in range(settings.power):
                    start = control.spread(start)
                found.append(torch.cat([start, maps[:, 1:]], 1).float().cpu())
        return torch.stack(found).mean(0)

    def _in_pixels(
        self, source: Tensor, things: Tensor, drawn: Tensor, settings: LocalizationSettings
    ) -> tuple[Tensor, Tensor]:
        """Compute the map of all things `(images, 1, height, width)`, and each name's map along the image's edges."""
        size = (source.shape[2], source.shape[3])
        guide = padded(source, self._side).float().cpu()
        whole, grid = (guide.shape[2], guide.shape[3]), (things.shape[2], things.shape[3])
        detail = min(DETAIL, max(1, whole[0] // grid[0]))
        fine = (grid[0] * detail, grid[1] * detail)
        blurred = cropped(enlarged(things, whole), size)
        if not settings.edge_radius:
            return blurred, blurred * cropped(belongs(enlarged(drawn, whole)), size)
        each = enlarged(things, fine) * belongs(enlarged(drawn, fine))
        return blurred, cropped(along_edges(each, guide, settings.edge_radius * detail), size)


def describe(name: str) -> tuple[str, str]:
    """Split a name into article and noun; the article is added where there is none.

    Raises:
        MaskError: The name is empty.
    """
    words = name.split()
    article = words[:1] if words[:1] and words[0].lower() in ("a", "an", "the") else []
    noun = words[len(article) :]
    if not noun:
        raise MaskError(f"{name!r} names nothing: say what to find, for instance 'cat'")
    article = article or ["an" if noun[0][0].lower() in "aeiou" else "a"]
    return article[0], " ".join(noun)


def prompt_of(tower: TextTower, names: Sequence[str]) -> tuple[str, list[slice]]:
    """Make a prompt with all names, and give the positions of their nouns' tokens.

    Raises:
        MaskError: A name is empty, or the text encoder has no room for all names.
    """
    prompt, spans = "", []
    for name in names:
        article, noun = describe(name)
        prompt += f" and {article}" if prompt else article
        start = tower.leading + len(tower.word_ids(prompt))
        prompt += f" {noun}"
        spans.append(slice(start, tower.leading + len(tower.word_ids(prompt))))
    if (length := len(tower.prompt_ids(prompt))) > tower.max_length:
        raise MaskError(
            f"the {len(names)} names take {length} tokens in one prompt, and the text encoder reads "
            f"{tower.max_length}: name fewer things, or write them shorter"
        )
    return prompt, spans


def name_weights(backbone: Backbone, names: Sequence[str]) -> tuple[str, Tensor]:
    """Make a prompt with all names, and weights `(1, tokens, 1 + names)`, 1 at each noun's tokens.

    The weights of the first map are set by the caller.
    """
    runs = backbone.token_runs
    found = [prompt_of(run.tower, names) for run in runs]
    weights = torch.zeros(1, max(run.first + run.tower.max_length for run in runs), 1 + len(names))
    for run, (_, spans) in zip(runs, found, strict=True):
        for column, span in enumerate(spans):
            weights[:, run.first + span.start : run.first + span.stop, 1 + column] = 1
    return found[0][0], weights


def say_experimental(what: str) -> None:
    """Warn, once for each thing, that it is an experiment."""
    if what not in _SAID:
        _SAID.add(what)
        warnings.warn(
            f"{what} is an experiment: no paper describes it, and it was measured on the embedded models alone; look "
            "at what comes out",
            ExperimentalWarning,
            stacklevel=3,
        )


def localization_sites(
    denoiser: nn.Module, latent_size: tuple[int, int]
) -> tuple[list[AttentionSite], list[AttentionSite]]:
    """Find the decoder's cross-attention at the coarsest grid of `GRIDS`, and its self-attention at the finest.

    Where all grids are finer, as in SDXL at 2048 pixels, the coarsest one is used. In transformers it is the joint
    attention of the blocks with separate streams for image and text.

    Raises:
        MaskError: All grids are coarser.
    """
    sites = attention_sites(denoiser)
    if joint := [site for site in sites if site.kind == "joint" and site.name.startswith("transformer_blocks.")]:
        return joint, joint
    decoder = [site for site in sites if site.in_decoder]
    sides = {site.name: min(site.grid(*latent_size)) for site in decoder}
    finest_read = max(GRIDS[1], min(sides.values(), default=0))
    fitting = [site for site in decoder if GRIDS[0] <= sides[site.name] <= finest_read]
    cross = [site for site in fitting if site.kind == "cross"]
    own = [site for site in fitting if site.kind == "self"]
    if not cross or not own:
        raise MaskError(
            f"no attention layer of the decoder has a grid of {GRIDS[0]} tokens a side or more for a latent of "
            f"{latent_size[1]}x{latent_size[0]}: use images nearer to the size that the model was made for"
        )
    coarsest, finest = max(site.downsampling for site in cross), min(site.downsampling for site in own)
    return (
        [site for site in cross if site.downsampling == coarsest],
        [site for site in own if site.downsampling == finest],
    )


def comparable(maps: Tensor, things: Tensor, settings: LocalizationSettings) -> Tensor:
    """Normalise the names' maps so that they can be compared, `(images, names, rows, columns)`.

    Names get different amounts of attention, so each map is divided by its mean over the foreground; maps are also
    smoothed, because no object is only one token large.

    Args:
        maps: The names' maps, `(images, names, rows, columns)`.
        things: Foreground map in 0-1, `(images, 1, rows, columns)`.
        settings: See `LocalizationSettings`.
    """
    inside = (things > settings.threshold).float()
    mean = (maps * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp_min(1)
    sigma = settings.smoothing * min(maps.shape[2:])
    side = 2 * min(round(3 * sigma), min(maps.shape[2:]) - 1) + 1

    def blur(x: Tensor) -> Tensor:
        return gaussian_blur(x, [side, side], [sigma, sigma])

    return blur(maps / mean.clamp_min(1e-8) * inside) / blur(inside).clamp_min(1e-3)


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps smoothly to rows and columns, `(images, maps, rows, columns)`."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def belongs(maps: Tensor) -> Tensor:
    """Assign each place to the name with the largest map, `(images, names, rows, columns)` bool."""
    return maps.argmax(1, keepdim=True) == torch.arange(maps.shape[1])[None, :, None, None]


def along_edges(maps: Tensor, image: Tensor, radius: int) -> Tensor:
    """Align maps with an image's edges: the fast guided filter (He and Sun 2015, arXiv 1505.00996).

    Around each place a map is replaced by the linear function of the image's colours that fits it best.

    Args:
        maps: `(images, maps, rows, columns)`.
        image: `(images, colours, height, width)` in 0-1.
        radius: Radius of the square around each place, in rows and columns of the maps.

    Returns:
        `(images, maps, height, width)`. The sum over maps is the filtered sum.
    """
    window = (2 * radius + 1, 2 * radius + 1)

    def averaged(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, 1, radius, count_include_pad=False)

    colours, count = image.shape[1], maps.shape[1]
    small = F.interpolate(image, maps.shape[2:], mode="area")
    pairs, mixed = ((small[:, :, None] * other[:, None]).flatten(1, 2) for other in (small, maps))
    sizes = [colours, count, colours**2, colours * count]
    colour, level, pairs, mixed = averaged(torch.cat([small, maps, pairs, mixed], 1)).split(sizes, 1)
    covariance, shared = (
        (both.unflatten(1, (colours, -1)) - colour[:, :, None] * other[:, None]).permute(0, 3, 4, 1, 2)
        for both, other in ((pairs, colour), (mixed, level))
    )
    slope = torch.linalg.solve(covariance + EDGE * torch.eye(colours), shared).permute(0, 3, 4, 1, 2)
    offset = level - (slope * colour[:, :, None]).sum(1)
    line = averaged(torch.cat([slope.flatten(1, 2), offset], 1))
    line = enlarged(line, (image.shape[2], image.shape[3]))
    slope, offset = line.split([colours * count, count], 1)
    return (slope.unflatten(1, (colours, count)) * image[:, :, None]).sum(1) + offset


__all__ = ["Localization", "LocalizationMixin", "LocalizationSettings", "localization_sites"]
