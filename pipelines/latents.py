"""Encoding of images as latents, for finding things and for inpainting."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from erasure.errors import MaskError
from erasure.interop.pipelines import execution_device
from erasure.interop.protocols import as_pipeline
from erasure.pipelines.mixin import SharedModulesMixin
from erasure.pipelines.pictures import Pictures, padded, read_pixels

SIDE = 8
"""Number of pixels to a multiple of which sides are padded, as stock pipelines need; also the smallest side of an
image."""
MODE: Literal["mode"] = "mode"
"""Use the mode of the VAE's posterior instead of a random sample."""
Generators = torch.Generator | list[torch.Generator] | None
Draw = Generators | Literal["mode"]


class ImagesMixin(SharedModulesMixin):
    """Mixin for a stock pipeline class."""

    def read_images(self, image: Pictures) -> Tensor:
        """Read images as `(batch, 3, height, width)` float32 in 0-1; see `read_pixels`.

        Raises:
            MaskError: The images cannot be read, or are too small for the VAE.
        """
        pixels = read_pixels(image)
        rows, columns = pixels.shape[2:]
        if min(rows, columns) < self._side:
            raise MaskError(f"an image of {columns}x{rows} pixels is too small: {self._side} a side at least")
        return pixels

    @property
    def _side(self) -> int:
        """Number of pixels of which the sides of the model's images are multiples."""
        return max(SIDE, self._backbone.latents.step)

    def encode_images(self, images: Tensor, draw: Draw = MODE) -> Tensor:
        """Encode images as latents `(batch, channels, h, w)`; sides are padded to multiples that the VAE needs.

        Args:
            images: `(batch, 3, height, width)` in 0-1.
            draw: `MODE` takes the mode of the posterior, which is deterministic; a generator, one for each image, or
                `None` (torch's own) samples from it.
        """
        pipe = as_pipeline(self)
        images, vae = padded(images, self._side), pipe.vae
        dtype = torch.float32 if vae.config.get("force_upcast") and vae.dtype == torch.float16 else vae.dtype
        before = vae.dtype
        if dtype != before:
            vae.to(dtype)
        encoded = vae.encode((2 * images - 1).to(execution_device(pipe), dtype)).latent_dist
        if dtype != before:
            vae.to(before)
        if draw == MODE:
            latents = encoded.mode()
        else:
            # This samples as the stock pipelines do: with the same noise, in the same order.
            noise = randn_tensor(encoded.mean.shape, draw, encoded.mean.device, encoded.mean.dtype)
            latents = encoded.mean + encoded.std * noise
        backbone = self._backbone
        return backbone.latents.from_vae(latents).to(backbone.dtype)
