"""Object removal without training: Attentive Eraser (Sun et al. 2025, arXiv 2412.12974).

The stock inpainting loop keeps the surroundings: after every step they are restored with the noise of that step.
Meanwhile self-attention in the decoder is redirected (AAS): no token attends to the masked part, so the hole is filled
from its surroundings and not from the object. At first the queries under the mask are scaled down too, so that similar
objects do not get all the attention (similarity suppression). The prediction is then guided from the ordinary
prediction towards the redirected one (SARG): `e = e_ordinary + s (e_redirected - e_ordinary)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.utils import BaseOutput
from torch import Tensor

from erasure.backbones import AttentionSite
from erasure.carriers.attention import AttentionController, Layout
from erasure.carriers.guidance import BranchGuidance, can_share_trunk
from erasure.errors import MaskError, OptionError
from erasure.guards import unguarded
from erasure.interop.pipelines import interrupt
from erasure.interop.protocols import Callback, Pipeline, Settings, as_pipeline
from erasure.masks import blend, fitted, grow, latent_aligned, read_masks
from erasure.pipelines import inversion
from erasure.pipelines.crops import Box, by_crops, worked_size
from erasure.pipelines.free_u import FreeU, free_u
from erasure.pipelines.inversion import check_ddim
from erasure.pipelines.latents import MODE, Generators
from erasure.pipelines.localization import LocalizationMixin
from erasure.pipelines.mixin import ErasureMixin
from erasure.pipelines.pictures import Pictures, cropped, padded, resized
from erasure.pipelines.prompts import BESIDE_PROMPTS, for_each, one_for_each
from erasure.pipelines.removal_settings import PRESETS, Layers, RemovalSettings, chosen
from erasure.pipelines.shadows import with_shadows
from erasure.world import World

BLENDED = 15 / 512
"""Radius of the final blending, as a share of the image's shorter side."""


class ObjectRemovalMixin(LocalizationMixin):
    """Mixin for a stock inpainting pipeline class."""

    output: ClassVar[type[BaseOutput]]
    """Class of the stock call's result."""
    guided_by: ClassVar[str] = "guidance_scale"
    """Argument of the stock call that switches classifier-free guidance on above 1."""
    own_preset: ClassVar[str] = "default"
    """Default preset."""

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        mask_image: object = None,
        *,
        words: str | Sequence[str] | None = None,
        others: str | Sequence[str] = (),
        prompt: str | Sequence[str] = "",
        preset: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        guidance_scale: float = 1.0,
        output_type: Literal["pil", "np", "pt"] = "pil",
        callback_on_step_end: Callback | None = None,
        **options: object,
    ) -> Any:
        """Remove the masked parts of images and fill them with background.

        Args:
            image: One image or several of one size; see `erasure.pipelines.pictures.read_pixels`. The result has the
                same size, and the image's own pixels wherever nothing is removed, unless `blend_radius` is 0.
            mask_image: One mask for all, or one for each image; see `erasure.masks.read_masks`. An image with an empty
                mask is returned unchanged.
            words: Names of things to remove, instead of a mask. They are found by `localize`; a name that is not found
                is an error.
            others: Names of other things in the image that must stay, which improves the masks of `localize`.
            prompt: Description of the filling, for all images or one for each; the paper leaves it empty.
            preset: Name of a preset of `RemovalSettings`; that of the family when left out.
            height: Height of the output in pixels; the image's own when left out.
            width: Width of the output in pixels; the image's own when left out.
            num_images_per_prompt: Number of results for each image, in succession in the output.
            generator: Random generator of the noise, on the CPU for reproducible results; one, or one for each result.
            guidance_scale: Scale of classifier-free guidance; 1 switches it off, as the paper does.
            output_type: Type of the result's images.
            callback_on_step_end: Callback as in diffusers.
            **options: Single settings of `RemovalSettings`; other options go to the stock call.

        Returns:
            The stock pipeline's result; `.images` in the order of the input.

        Raises:
            MaskError: The mask covers everything, does not fit, or there is neither mask nor words.
            OptionError: The preset is unknown, a setting is invalid, or the number of texts differs from that of
                images.
            UnsupportedModelError: The UNet or the scheduler does not allow the settings.
        """
        self.check_model()
        settings, rest = chosen(self.own_preset if preset is None else preset, options)
        given = {"guidance_scale": guidance_scale}
        if output_type not in (forms := ("pil", "np", "pt")):
            raise OptionError(f"output_type is {output_type!r}; allowed: {', '.join(forms)}")
        source = self.read_images(image)
        own, count = (source.shape[2], source.shape[3]), len(source)
        prompts = one_for_each("prompt", prompt, count)
        backbone = self._backbone
        lengths = {}
        if backbone.takes_length:
            length = rest.get("max_sequence_length") or World.of(backbone.pipe).text_length
            lengths = {} if length is None else {"max_sequence_length": length}
        masks = self._masks(source, mask_image, words, others, lengths, settings.crop)
        size = self._size(own, height, width)
        source, masks = resized(source, size), fitted(masks, size)
        if settings.shadow:
            masks = with_shadows(masks, source)
        if masks.flatten(1).all(1).any():
            raise MaskError("a mask covers the whole image: nothing is left to fill it from")
        empty = ~masks.flatten(1).any(1)
        if empty.any():
            warnings.warn(
                f"the masks of {int(empty.sum())} of {count} images are empty: they come back as they are",
                stacklevel=2,
            )
        rest = for_each(rest, count, num_images_per_prompt)
        if rest.get("negative_prompt") is not None and (rest | given).get(self.guided_by, 1.0) <= 1:
            warnings.warn(f"negative_prompt= does nothing at {self.guided_by}=1: raise it", stacklevel=2)
        source, masks, empty = (part.repeat_interleave(num_images_per_prompt, 0) for part in (source, masks, empty))
        if empty.all():
            return self._returned(source, output_type, rest.get("return_dict", True), None)
        tensors = list(dict.fromkeys(["latents", *rest.pop("callback_on_step_end_tensor_inputs", [])]))
        call = {
            "prompt": [text for text in prompts for _ in range(num_images_per_prompt)], **given,
            "num_inference_steps": settings.num_inference_steps, "generator": generator, **lengths, **rest,
            "callback_on_step_end": callback_on_step_end, "callback_on_step_end_tensor_inputs": tensors,
        }  # fmt: skip
        fill = self._filled_by_crops if settings.crop else self._filled
        pixels, flags = fill(source, masks, call, settings)
        pixels = torch.where(empty[:, None, None, None].to(pixels.device), source.to(pixels), pixels)
        return self._returned(pixels, output_type, rest.get("return_dict", True), flags)

    def _filled(
        self, source: Tensor, masks: Tensor, call: Settings, settings: RemovalSettings
    ) -> tuple[Tensor, list[bool] | None]:
        """Fill the masked parts of images, working on whole images.

        Args:
            source: `(images, 3, height, width)` in 0-1.
            masks: `(images, height, width)` bool.
            call: Arguments of the stock call, without those that depend on the pixels.
            settings: Settings of the removal.

        Returns:
            Images of the same shape, and the flags of the safety checker, if there is one.
        """
        backbone, size = self._backbone, (source.shape[2], source.shape[3])
        factor, then = backbone.latents.factor, call["callback_on_step_end"]
        masks, keep = self._covered(masks, settings.mask_blur)
        call = {
            **call, "height": keep.shape[2], "width": keep.shape[3],
            **self._conditioning(source, keep, settings, call["generator"]),
        }  # fmt: skip
        control, guidance = self._redirected(padded(masks[:, None].float(), self._side)[:, 0] > 0, settings)
        with self._scheduler(settings):
            record: list[Tensor] = []
            if settings.sampler == "inversion":
                record = self._invert(call, settings, keep)
                call["latents"] = record[0]
            follow = _Follow(control, record, keep[:, :, ::factor, ::factor], then)
            factors = None if settings.free_u is None else FreeU(*settings.free_u)
            with control, guidance, free_u(backbone.denoiser, factors):
                pixels, flags = self._drawn({
                    **call, "mask_image": keep.float(), "strength": settings.strength, "output_type": "pt",
                    "callback_on_step_end": follow,
                })  # fmt: skip
        pixels = cropped(pixels, size)
        radius = BLENDED * min(size) if settings.blend_radius is None else settings.blend_radius
        return (blend(source, pixels, masks, radius) if radius > 0 else pixels), flags

    def _filled_by_crops(
        self, source: Tensor, masks: Tensor, call: Settings, settings: RemovalSettings
    ) -> tuple[Tensor, list[bool] | None]:
        """Fill as `_filled` does, working on crops around the masks at the model's size; see `by_crops`."""
        if call.get("latents") is not None:
            raise OptionError("latents= has one size, and crops have several: leave it out, or crop=True")
        whole, generators = replace(settings, blend_radius=0.0), call["generator"]
        source, flags, is_checked = source.clone(), [], False
        for row, mask in enumerate(masks):
            own = {name: [call[name][row]] for name in ("prompt", *BESIDE_PROMPTS) if call.get(name) is not None}
            own["generator"] = generators[row] if isinstance(generators, list) else generators
            flagged: list[bool] = []

            def fill(part: Tensor, hole: Tensor, own: Settings = own, flagged: list[bool] = flagged) -> Tensor:
                made, found = self._filled(part, hole, {**call, **own}, whole)
                flagged += found or ()
                return made

            image = source[row : row + 1]
            source[row : row + 1] = by_crops(image, mask, self.drawn_side, settings, BLENDED, fill)
            flags.append(any(flagged))
            is_checked |= bool(flagged)
        return source, flags if is_checked else None

    def check_model(self) -> None:
        """Refuse a model that the stock loop does not support; all are supported here."""

    def _drawn(self, call: Settings) -> tuple[Tensor, list[bool] | None]:
        """Run the stock call; give pixels `(images, 3, height, width)` in 0-1, and the flags of its safety checker."""
        result = super().__call__(**call)  # type: ignore[misc]
        return result[0], getattr(result, "nsfw_content_detected", None)

    # Before --------------------------------------------------------------------------------------------------------

    def _masks(
        self, source: Tensor, given: object, words: str | Sequence[str] | None, others: str | Sequence[str],
        options: Settings, crop: bool,
    ) -> Tensor:  # fmt: skip
        """Give the masks to remove, `(images, rows, columns)` bool: the given ones, or those of the words."""
        if given is not None:
            return read_masks(given, (source.shape[2], source.shape[3]), len(source))
        if words is None:
            raise MaskError("nothing says what to remove: pass mask_image=, or words= to have it looked for")
        seen = resized(source, self.drawn_size(source.shape[2], source.shape[3])) if crop else source
        return self.localize(seen, words, others=others, **options).of_words()

    @property
    def drawn_side(self) -> int:
        """Shorter side in pixels of the images that the model was made for."""
        latents = self._backbone.latents
        return min(latents.side) * latents.factor

    def drawn_size(self, height: int, width: int) -> tuple[int, int]:
        """Give the height and width at which the model can see a whole image at once, reduced where needed."""
        return worked_size(Box(0, 0, height, width), self.drawn_side)

    def _size(self, own: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
        """Give the height and width of the output in pixels."""
        size = (own[0] if height is None else height, own[1] if width is None else width)
        if any(isinstance(side, bool) or not isinstance(side, int) or side < self._side for side in size):
            raise OptionError(f"height and width are {size[0]} and {size[1]}: give whole numbers from {self._side} on")
        return size

    def _covered(self, masks: Tensor, blur: int) -> tuple[Tensor, Tensor]:
        """Grow masks; give them, and every pixel `(images, 1, padded height, padded width)` that is filled.

        A mask that would cover the whole image after growing is not grown.

        Raises:
            MaskError: A mask covers every latent pixel.
        """
        factor = self._backbone.latents.factor

        def painted(masks: Tensor) -> Tensor:
            return latent_aligned(padded(masks[:, None].float(), self._side)[:, 0] > 0, factor)[:, None]

        grown = grow(masks, blur)
        keep = painted(grown)
        if (full := keep.flatten(1).all(1)).any():
            grown = torch.where(full[:, None, None], masks, grown)
            keep = painted(grown)
        if keep.flatten(1).all(1).any():
            raise MaskError(
                f"a mask leaves less than {factor} pixels anywhere, which the model cannot see as surroundings: draw "
                "a smaller one, or use a larger image"
            )
        return grown, keep

    def _conditioning(
        self, source: Tensor, covered: Tensor, settings: RemovalSettings, generator: Generators
    ) -> dict[str, Tensor]:
        """Encode the image, and for an inpainting UNet with nine channels the image with a grey hole."""
        latents = self.encode_images(source, generator if settings.sample_latents else MODE)
        if self._blends:
            return {"image": latents, "masked_image_latents": torch.zeros_like(latents)}
        with unguarded():
            # The warning about an initial picture has been given already.
            hole = torch.where(covered, 0.5, padded(source, self._side))
            return {"image": latents, "masked_image_latents": self.encode_images(hole)}

    @contextmanager
    def _scheduler(self, settings: RemovalSettings) -> Iterator[None]:
        """Use the settings' scheduler inside of the block."""
        pipe, denoiser = as_pipeline(self), self._backbone.denoiser
        own = pipe.scheduler
        if settings.released_scheduler:
            check_ddim(denoiser, own, "released_scheduler=True")
            pipe.scheduler = inversion.released(own)
        if settings.sampler == "inversion":
            check_ddim(denoiser, own, "sampler='inversion'")
            pipe.scheduler = inversion.forwards(pipe.scheduler)
        try:
            yield
        finally:
            pipe.scheduler = own

    def _redirected(
        self, masks: Tensor, settings: RemovalSettings
    ) -> tuple[AttentionController, AbstractContextManager[object]]:
        """Make the attention controller, and the guidance that combines its branches."""
        backbone = self._backbone
        denoiser, factor = backbone.denoiser, backbone.latents.factor
        sites = self.removal_sites(settings.layers)
        guided = settings.redirect and settings.removal_guidance_scale != 1
        grid = (masks.shape[1] // factor, masks.shape[2] // factor)
        layout = Layout(grid, len(masks), branches=2, changed=(1,)) if guided else Layout(grid, len(masks))
        control = AttentionController(denoiser, layout)
        if settings.redirect:
            share = settings.suppression_share
            if settings.log_weight is None:
                control.drop_keys(masks, sites, query_scale=settings.suppression_scale, scale_until=share)
            else:
                control.weight_keys(
                    masks, settings.log_weight, sites, query_scale=settings.suppression_scale, scale_until=share
                )
        if not guided:
            return control, nullcontext()
        possible = can_share_trunk(denoiser, sites)
        if settings.shared_trunk and not possible:
            raise OptionError(
                f"shared_trunk=True needs a UNet and layers='decoder', and here layers={settings.layers!r}: leave "
                "shared_trunk out"
            )
        shared = possible if settings.shared_trunk is None else settings.shared_trunk
        return control, BranchGuidance(denoiser, settings.removal_guidance_scale, shared_trunk=shared)

    def removal_sites(self, layers: Layers = "decoder") -> list[AttentionSite]:
        """Find the redirected layers: self-attention, and joint attention of image and text."""
        sites = [site for site in self._backbone.attention_sites() if site.kind != "cross"]
        if layers == "all":
            return sites
        decoder = [site for site in sites if site.in_decoder]
        return decoder or sites[len(sites) // 2 :]

    def _invert(self, call: Settings, settings: RemovalSettings, keep: Tensor) -> list[Tensor]:
        """Invert the image: its latents at every step that will be run, noisiest first, and the clean ones."""
        pipe = as_pipeline(self)
        steps = settings.executed
        found = [call["image"]]

        def remember(pipe: Pipeline, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if len(found) <= steps:
                found.append(tensors["latents"])
            if len(found) > steps:
                interrupt(pipe)
            return tensors

        own = pipe.scheduler
        pipe.scheduler = inversion.backwards(own)
        # The inversion must not blend anything under the mask; a UNet with nine channels reads the mask of the
        # sampling.
        mask = torch.ones_like(keep) if self._blends else keep
        try:
            super().__call__(  # type: ignore[misc]
                **call | {"guidance_scale": 1.0, "latents": found[0], "callback_on_step_end": remember},
                mask_image=mask.float(), strength=1.0, output_type="latent",
            )  # fmt: skip
        finally:
            pipe.scheduler = own
        return found[::-1]

    @property
    def _blends(self) -> bool:
        """Whether the denoiser reads latents only, so that the loop restores surroundings; others read the mask."""
        config = self._backbone.denoiser.config
        return config.in_channels == (config.out_channels or config.in_channels)

    # After ---------------------------------------------------------------------------------------------------------

    def _returned(self, pixels: Tensor, output_type: str, return_dict: bool, flags: list[bool] | None) -> Any:
        """Wrap images in the stock class's result; only Stable Diffusion 1.x and 2.x have safety flags."""
        images = as_pipeline(self).image_processor.postprocess(
            pixels.float(), output_type=output_type, do_denormalize=[False] * len(pixels)
        )
        flagged = {"nsfw_content_detected": flags} if "nsfw_content_detected" in self.output.__annotations__ else {}
        return self.output(images=images, **flagged) if return_dict else (images, *flagged.values())


class _Follow:
    """Step callback that tells the controller the share of steps done, and restores recorded surroundings."""

    def __init__(
        self, control: AttentionController, record: Sequence[Tensor], keep: Tensor, then: Callback | None
    ) -> None:
        self.control, self.record, self.keep, self.then = control, record, keep, then

    def __call__(self, pipe: Pipeline, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.control.at((index + 1) / pipe.num_timesteps)
        if self.record:
            keep = self.keep.to(tensors["latents"])
            tensors["latents"] = keep * tensors["latents"] + (1 - keep) * self.record[index + 1]
        return tensors if self.then is None else self.then(pipe, index, t, tensors)


class StableDiffusionObjectRemovalPipeline(ObjectRemovalMixin, ErasureMixin, StableDiffusionInpaintPipeline):
    """Object removal with Stable Diffusion 1.x and 2.x; see `ObjectRemovalMixin.__call__`.

    Example:
        >>> pipe = StableDiffusionObjectRemovalPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> clean = pipe(Image.open("scene.png"), Image.open("mask.png")).images[0]
    """

    output = StableDiffusionPipelineOutput


class StableDiffusionXLObjectRemovalPipeline(ObjectRemovalMixin, ErasureMixin, StableDiffusionXLInpaintPipeline):
    """Object removal with Stable Diffusion XL; the paper's settings are `preset="official-sdxl"`.

    Example:
        >>> pipe = StableDiffusionXLObjectRemovalPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> clean = pipe(Image.open("scene.png"), Image.open("mask.png"), preset="official-sdxl").images[0]
    """

    output = StableDiffusionXLPipelineOutput


__all__ = [
    "PRESETS",
    "ObjectRemovalMixin",
    "RemovalSettings",
    "StableDiffusionObjectRemovalPipeline",
    "StableDiffusionXLObjectRemovalPipeline",
]
