"""Object removal without training: Attentive Eraser (Sun et al. 2025, arXiv 2412.12974).

The stock inpainting loop keeps the surroundings: after every step they are put back with the noise of that step.
While it runs, self-attention of the decoder is redirected (AAS): nothing attends to what the mask covers, so the hole
is filled from its surroundings and not from the object; at first its queries are scaled down as well, so that objects
that look alike do not draw all attention (similarity suppression). The prediction is then steered from the ordinary
one towards the redirected one (SARG): `e = e_ordinary + s (e_redirected - e_ordinary)`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from torch import Tensor

from erasure.backbones import AttentionSite, attention_sites
from erasure.carriers.attention import AttentionController, Layout
from erasure.carriers.guidance import BranchGuidance, can_share_trunk
from erasure.errors import MaskError, OptionError
from erasure.guards import unguarded
from erasure.interop.pipelines import interrupt
from erasure.interop.protocols import Callback, Pipeline, Settings, as_pipeline
from erasure.masks import blend, grow, latent_aligned, read_masks
from erasure.pipelines.localization import LocalizationMixin, Pictures
from erasure.pipelines.mixin import ErasureMixin, for_each

Sampler = Literal["blended", "inversion"]
Layers = Literal["decoder", "all"]


@dataclass(frozen=True, kw_only=True)
class RemovalSettings:
    """How objects are removed. The defaults are those of the paper's code, on the pipeline's own scheduler."""

    num_inference_steps: int = 50
    """Steps of the schedule, of which the last `strength` are run."""
    strength: float = 0.8
    """Share of the steps that are run: where the surroundings begin to be denoised."""
    removal_guidance_scale: float = 9.0
    """s of SARG. 1 takes the redirected prediction as it is, and costs one branch less."""
    redirect: bool = True
    """Whether attention is redirected; without, this is inpainting with blended latents."""
    suppression_scale: float = 0.3
    """What the queries under the mask are multiplied by while similarity is suppressed."""
    suppression_share: float = 0.25
    """For this share of the executed steps (the code: 10 of 40)."""
    log_weight: float | None = None
    """Attention to what the mask covers is multiplied by the exponential of this, instead of being cut off altogether:
    AdaEraser's soft form, `log eta`."""
    layers: Layers = "decoder"
    """Self-attention that is redirected. With `decoder`, what runs ahead of it runs once for both branches."""
    mask_blur: int = 7
    """Side in pixels of the Gaussian that grows the mask, see `erasure.masks.grow`."""
    sampler: Sampler = "blended"
    """`blended` puts noised surroundings back after every step; `inversion` those of a DDIM inversion of the image,
    which is deterministic and costs a run more."""
    blend_radius: float | None = None
    """Pixels over which the source's own pixels are blended in around the mask at the end: when left out, 15 on an
    image of 512, as in the paper's figures; 0 leaves the surroundings as the VAE decodes them."""
    shared_trunk: bool | None = None
    """Run what is ahead of the decoder once; where it is possible when left out."""
    released_scheduler: bool = False
    """Sample with the DDIM scheduler of the paper's code, whose steps have no offset."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.num_inference_steps < 1 or not 0 < self.strength <= 1:
            raise OptionError(
                f"num_inference_steps is at least 1 and strength above 0, at most 1; got {self.num_inference_steps} "
                f"and {self.strength}"
            )
        for name, allowed in (("sampler", Sampler), ("layers", Layers)):
            if getattr(self, name) not in get_args(allowed):
                raise OptionError(f"{name} is one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")


BLENDED = 15 / 512
"""Radius of the blending, as a share of the image's shorter side."""
_released = RemovalSettings(released_scheduler=True, blend_radius=0.0)
PRESETS: dict[str, RemovalSettings] = {
    "default": RemovalSettings(),
    "official-sd15": _released,
    "official-sd21": _released,
    "official-sdxl": dataclasses.replace(_released, mask_blur=77),
}
"""Settings by name. `official-*` are those of the paper's code; its SD 2.1 scripts also switch FreeU on
(`pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)`), which its text does not mention."""


class _Inverter(DDIMInverseScheduler):
    """DDIM backwards in a loop that noises what lies outside of the mask: here that is nothing."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return original_samples


class ObjectRemovalMixin(LocalizationMixin):
    """Put ahead of a stock inpainting pipeline."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Pictures,
        mask_image: object = None,
        *,
        words: str | Sequence[str] | None = None,
        others: Sequence[str] = (),
        prompt: str = "",
        preset: str = "default",
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_scale: float = 1.0,
        output_type: Literal["pil", "np", "pt"] = "pil",
        callback_on_step_end: Callback | None = None,
        **options: object,
    ) -> Any:
        """Take what the mask covers out of images and fill its place with background.

        Args:
            image: One image or several of one size: PIL, array `(height, width, 3)`, or tensor `(3, height, width)` in
                0-1. Its sides are brought down to multiples of 8.
            mask_image: One mask for all, or one for each image; see `erasure.masks.read_masks`. An image whose mask is
                empty comes back as it is.
            words: Without a mask: what to remove, found by `localize`.
            others: Other things in the image that must stay, which makes `localize` surer.
            prompt: What should be there instead; the paper leaves it empty.
            preset: Name of settings in `PRESETS`.
            height: Of the output in pixels; the image's own when left out.
            width: The same.
            num_images_per_prompt: Results for each image, next to one another in the output.
            generator: Of the noise, on the CPU for reproducible results; one, or one for each result.
            guidance_scale: Of the prompt; 1 switches classifier-free guidance off, as the paper does.
            output_type: What comes back.
            callback_on_step_end: As diffusers calls it.
            **options: Single settings to change, see `RemovalSettings`; what is none of them goes to the stock call.

        Returns:
            What the stock pipeline returns; `.images` in the order of the input.

        Raises:
            MaskError: The mask covers everything, does not fit, or there is neither mask nor words.
            OptionError: Unknown preset, or a setting without meaning.
        """
        settings, rest = _settings(preset, options)
        pipe = as_pipeline(self)
        source = self.read_images(image, height, width)
        size = (source.shape[2], source.shape[3])
        if mask_image is None:
            if words is None:
                raise MaskError("nothing says what to remove: pass mask_image=, or words= to have it looked for")
            found = self.localize(source, words, others=others)
            names = 1 if isinstance(words, str) else len(words)
            masks = found.masks[:, :names].any(1)
        else:
            masks = read_masks(mask_image, size, len(source))
        if masks.flatten(1).all(1).any():
            raise MaskError("a mask covers the whole image: nothing is left to fill it from")
        empty = ~masks.flatten(1).any(1)
        if empty.any():
            warnings.warn(
                f"the masks of {int(empty.sum())} of {len(empty)} images are empty: they come back as they are",
                stacklevel=2,
            )
        masks = grow(masks, settings.mask_blur)
        rest = for_each(rest, len(source), num_images_per_prompt)
        source, masks, empty = (part.repeat_interleave(num_images_per_prompt, 0) for part in (source, masks, empty))
        if empty.all():
            return self._returned(source, output_type, rest.get("return_dict", True), None)
        factor = pipe.vae_scale_factor
        keep = latent_aligned(masks, factor)[:, None]
        tensors = list(dict.fromkeys(["latents", *rest.pop("callback_on_step_end_tensor_inputs", [])]))
        call = {
            "prompt": [prompt] * len(source), "height": size[0], "width": size[1], "guidance_scale": guidance_scale,
            "num_inference_steps": settings.num_inference_steps, "generator": generator,
            **self._conditioning(source, keep), **rest,
        }  # fmt: skip
        with self._scheduler(settings):
            record: list[Tensor] = []
            if settings.sampler == "inversion":
                record = self._invert(call, settings)
                call["latents"] = record[0]
            control, guidance = self._redirected(masks, size, settings)
            follow = _Follow(control, record, keep[:, :, ::factor, ::factor], callback_on_step_end)
            with control, guidance:
                result = super().__call__(  # type: ignore[misc]
                    **call, mask_image=keep.float(), strength=settings.strength, output_type="pt",
                    callback_on_step_end=follow, callback_on_step_end_tensor_inputs=tensors,
                )  # fmt: skip
        pixels = result.images if hasattr(result, "images") else result[0]
        radius = BLENDED * min(size) if settings.blend_radius is None else settings.blend_radius
        if radius > 0:
            pixels = blend(source, pixels, masks, radius)
        pixels = torch.where(empty[:, None, None, None].to(pixels.device), source.to(pixels), pixels)
        flags = getattr(result, "nsfw_content_detected", None)
        return self._returned(pixels, output_type, rest.get("return_dict", True), flags)

    # Before --------------------------------------------------------------------------------------------------------

    def _conditioning(self, source: Tensor, covered: Tensor) -> dict[str, Tensor]:
        """The image as latents, and what an inpainting UNet with nine channels is given besides: a grey hole."""
        pipe = as_pipeline(self)
        latents = self.encode_images(source)
        if pipe.unet.config.in_channels == pipe.vae.config.latent_channels:
            return {"image": latents, "masked_image_latents": torch.zeros_like(latents)}
        with unguarded():
            # That a picture was handed in has been said.
            return {"image": latents, "masked_image_latents": self.encode_images(torch.where(covered, 0.5, source))}

    @contextmanager
    def _scheduler(self, settings: RemovalSettings) -> Iterator[None]:
        """The scheduler that the settings ask for, while the block runs."""
        pipe = as_pipeline(self)
        own = pipe.scheduler
        if settings.released_scheduler:
            pipe.scheduler = DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False, prediction_type=own.config.prediction_type,
            )  # fmt: skip
        elif settings.sampler == "inversion" and not isinstance(own, DDIMScheduler):
            pipe.scheduler = DDIMScheduler.from_config(own.config)
        try:
            yield
        finally:
            pipe.scheduler = own

    def _redirected(
        self, masks: Tensor, size: tuple[int, int], settings: RemovalSettings
    ) -> tuple[AttentionController, AbstractContextManager[object]]:
        """The controller, and the guidance that combines its branches."""
        pipe = as_pipeline(self)
        sites = self.removal_sites(settings.layers)
        guided = settings.redirect and settings.removal_guidance_scale != 1
        grid = (size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor)
        layout = Layout(grid, len(masks), branches=2, changed=(1,)) if guided else Layout(grid, len(masks))
        control = AttentionController(pipe.unet, layout)
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
        possible = can_share_trunk(pipe.unet, sites)
        if settings.shared_trunk and not possible:
            raise OptionError("shared_trunk=True needs layers='decoder' and a UNet")
        shared = possible if settings.shared_trunk is None else settings.shared_trunk
        return control, BranchGuidance(pipe.unet, settings.removal_guidance_scale, shared_trunk=shared)

    def removal_sites(self, layers: Layers = "decoder") -> list[AttentionSite]:
        """The self-attention layers that are redirected."""
        pipe = as_pipeline(self)
        sites = [site for site in attention_sites(pipe.unet) if site.kind == "self"]
        return sites if layers == "all" else [site for site in sites if site.name.startswith("up_blocks.")]

    def _invert(self, call: Settings, settings: RemovalSettings) -> list[Tensor]:
        """The image's latents at the noise level of every step that will be run, noisiest first, and the clean one."""
        pipe = as_pipeline(self)
        steps = min(int(settings.num_inference_steps * settings.strength), settings.num_inference_steps)
        found = [call["image"]]

        def keep(pipe: Pipeline, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if len(found) <= steps:
                found.append(tensors["latents"])
            if len(found) > steps:
                interrupt(pipe)
            return tensors

        own = pipe.scheduler
        pipe.scheduler = _Inverter.from_config(own.config)
        everything = torch.ones(len(found[0]), 1, call["height"], call["width"])
        try:
            super().__call__(  # type: ignore[misc]
                **call | {"guidance_scale": 1.0, "latents": found[0]}, mask_image=everything, strength=1.0,
                output_type="latent", callback_on_step_end=keep,
            )  # fmt: skip
        finally:
            pipe.scheduler = own
        return found[::-1]

    # After ---------------------------------------------------------------------------------------------------------

    def _returned(self, pixels: Tensor, output_type: str, return_dict: bool, flags: list[bool] | None) -> Any:
        from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

        pipe = as_pipeline(self)
        images = pipe.image_processor.postprocess(
            pixels.float(), output_type=output_type, do_denormalize=[False] * len(pixels)
        )
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)


class _Follow:
    """After every step: tells the controller how far the run is, and puts recorded surroundings back."""

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


def _settings(preset: str, options: Settings) -> tuple[RemovalSettings, Settings]:
    if preset not in PRESETS:
        raise OptionError(f"no preset {preset!r} of object removal; there are: {', '.join(PRESETS)}")
    known = {field.name for field in dataclasses.fields(RemovalSettings)}
    changed = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    return dataclasses.replace(PRESETS[preset], **changed), rest


class StableDiffusionObjectRemovalPipeline(ObjectRemovalMixin, ErasureMixin, StableDiffusionInpaintPipeline):
    """Object removal with Stable Diffusion 1.x and 2.x; see `ObjectRemovalMixin.__call__`.

    Example:
        >>> pipe = StableDiffusionObjectRemovalPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> clean = pipe(Image.open("scene.png"), Image.open("mask.png")).images[0]
    """


class StableDiffusionXLObjectRemovalPipeline(ObjectRemovalMixin, StableDiffusionXLInpaintPipeline):
    """Object removal with Stable Diffusion XL; the paper's settings are `preset="official-sdxl"`.

    Example:
        >>> pipe = StableDiffusionXLObjectRemovalPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> clean = pipe(Image.open("scene.png"), Image.open("mask.png"), preset="official-sdxl").images[0]
    """


__all__ = [
    "PRESETS",
    "ObjectRemovalMixin",
    "RemovalSettings",
    "StableDiffusionObjectRemovalPipeline",
    "StableDiffusionXLObjectRemovalPipeline",
]
