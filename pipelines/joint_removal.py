"""Object removal with Stable Diffusion 3 and Flux, whose attention is over image and text at once. An experiment.

Nobody has published Attentive Eraser on these families. What is done here is its plain translation: keys of the image
under the mask are left out for the image's queries and for the text's, which would carry the object back; the image's
queries there are scaled down; the surroundings are put back with the noise of each step (`scale_noise`).
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
"""Channels of the latents that the inpainting loop of diffusers for Stable Diffusion 3 blends."""


class JointRemovalMixin(ObjectRemovalMixin):
    """Put ahead of a stock inpainting pipeline with a transformer."""

    own_preset = "joint"
    needed: ClassVar[int | None] = None
    """Channels that the transformer must take, where the stock loop knows no other number."""

    def check_model(self) -> None:
        """Say once that this is an experiment.

        Raises:
            UnsupportedModelError: A transformer that paints by itself, or one that the stock loop cannot blend.
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

    `guidance_scale` is what a distilled transformer is told; a negative prompt takes `true_cfg_scale`.

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

        That one takes latents of other than 16 channels for pixels and encodes them, although the loop never looks at
        the masked image.
        """
        latents = self._backbone.latents
        _, rows, columns = latents.shape(height, width)
        small = F.interpolate(mask, size=(rows, columns)).to(device=device, dtype=dtype)
        repeats = batch_size * num_images_per_prompt // len(small)
        small = small.repeat(repeats, num_channels_latents, 1, 1)
        return latents.packed(small), masked_image
