"""Experimental object removal with Stable Diffusion 3 and Flux, whose attention is over image and text at once.

No paper applies Attentive Eraser to these families. This is a direct translation: keys of the masked part of the image
are dropped for the image's queries and for the text's, which would carry the object back; the image's queries under
the mask are scaled down; and the surroundings are restored with the noise of each step (`scale_noise`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FluxInpaintPipeline, StableDiffusion3InpaintPipeline
from diffusers.pipelines.flux import FluxPipelineOutput
from diffusers.pipelines.stable_diffusion_3 import StableDiffusion3PipelineOutput
from torch import Tensor
from torch.nn import functional as F

from erasure.errors import UnsupportedModelError
from erasure.interop.protocols import Settings
from erasure.pipelines.localization import say_experimental
from erasure.pipelines.mixin import ErasureMixin
from erasure.pipelines.removal import ObjectRemovalMixin

SD3_CHANNELS = 16
"""Number of latent channels that the inpainting loop of diffusers for Stable Diffusion 3 can blend."""


class JointRemovalMixin(ObjectRemovalMixin):
    """Mixin for a stock inpainting pipeline class with a transformer."""

    own_preset = "joint"
    needed: ClassVar[int | None] = None
    """Number of input channels that the stock loop needs in the transformer; `None` where any will do."""

    def check_model(self) -> None:
        """Warn once that this is an experiment.

        Raises:
            UnsupportedModelError: The transformer is an inpainting model, or the stock loop cannot blend its latents.
        """
        channels = self._backbone.denoiser.config.in_channels
        if not self._blends or self.needed not in (None, channels):
            raise UnsupportedModelError(
                f"the transformer takes {channels} channels, and the loop of {type(self).__mro__[-2].__name__} puts "
                f"surroundings back for transformers of plain latents, of {self.needed or 'any'} channels, alone; "
                "use a text-to-image model of the family"
            )
        say_experimental(f"object removal with {type(self._backbone.denoiser).__name__}")

    def _drawn(self, call: Settings) -> tuple[Tensor, list[bool] | None]:
        """See `ObjectRemovalMixin._drawn`; the stock loop of Stable Diffusion 3 decodes without the VAE's shift."""
        latents, flags = super()._drawn(call | {"output_type": "latent"})
        backbone = self._backbone
        return backbone.decode(backbone.latents.unpacked(latents, call["height"], call["width"])), flags


class StableDiffusion3ObjectRemovalPipeline(JointRemovalMixin, ErasureMixin, StableDiffusion3InpaintPipeline):
    """Object removal with Stable Diffusion 3 and 3.5; see `ObjectRemovalMixin.__call__`. An experiment.

    Example:
        >>> name = "stabilityai/stable-diffusion-3.5-medium"
        >>> pipe = StableDiffusion3ObjectRemovalPipeline.from_pretrained(name)
        >>> clean = pipe(Image.open("scene.png"), Image.open("mask.png")).images[0]
    """

    output = StableDiffusion3PipelineOutput
    needed = SD3_CHANNELS


class FluxObjectRemovalPipeline(JointRemovalMixin, ErasureMixin, FluxInpaintPipeline):
    """Object removal with Flux; see `ObjectRemovalMixin.__call__`. An experiment.

    `guidance_scale` is the guidance input of a distilled transformer; a negative prompt is used with `true_cfg_scale`.

    Example:
        >>> pipe = FluxObjectRemovalPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
        >>> clean = pipe(Image.open("scene.png"), Image.open("mask.png")).images[0]
    """

    output = FluxPipelineOutput
    guided_by = "true_cfg_scale"

    def prepare_mask_latents(
        self, mask: Tensor, masked_image: Tensor, batch_size: int, num_channels_latents: int,
        num_images_per_prompt: int, height: int, width: int, dtype: torch.dtype, device: torch.device,
        generator: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Give the mask as packed latents, as the stock method does.

        The stock method mistakes latents without 16 channels for pixels and encodes them, although the loop never uses
        the masked image.
        """
        latents = self._backbone.latents
        _, rows, columns = latents.shape(height, width)
        small = F.interpolate(mask, size=(rows, columns)).to(device=device, dtype=dtype)
        repeats = batch_size * num_images_per_prompt // len(small)
        small = small.repeat(repeats, num_channels_latents, 1, 1)
        return latents.packed(small), masked_image
