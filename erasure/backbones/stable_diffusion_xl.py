"""SDXL: two CLIP text towers side by side, the pooled vector of the second, and the picture's size beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from erasure.backbones.base import EntryLayer, TokenRun
from erasure.backbones.conditioning import Conditioning
from erasure.backbones.latents import Latents
from erasure.backbones.towers import TowerOutput
from erasure.backbones.unet import UNetBackbone
from erasure.errors import UnsupportedModelError
from erasure.interop import paths

FIRST, SECOND = "text_encoder", "text_encoder_2"


class StableDiffusionXLBackbone(UNetBackbone):
    """Any pipeline with a `UNet2DConditionModel` that is told text and size, and two CLIP text encoders."""

    family = "stable-diffusion-xl"

    @classmethod
    def matches(cls, pipe: DiffusionPipeline) -> bool:
        """Two text encoders and a UNet of SDXL's kind; a refiner has one of them only."""
        parts = pipe.components
        unet = parts.get("unet")
        network = paths.uncompiled(unet) if isinstance(unet, nn.Module) else None
        return (
            isinstance(network, UNet2DConditionModel)
            and network.config.addition_embed_type == "text_time"
            and all(isinstance(parts.get(name), nn.Module) for name in (FIRST, SECOND))
        )

    @property
    def token_runs(self) -> list[TokenRun]:
        """Those of both text encoders, which read the same tokens: their states stand side by side."""
        return [TokenRun((self.tower(FIRST), self.tower(SECOND)))]

    def compose(self, parts: Mapping[str, TowerOutput]) -> Conditioning:
        """The states of both beside one another, and the pooled vector of the second."""
        tokens = torch.cat([parts[name].states for name in (FIRST, SECOND)], -1)
        return Conditioning(tokens, parts[SECOND].pooled)

    def null(self, empty: Conditioning) -> Conditioning:
        """Zeros, where the model was trained so."""
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        assert empty.pooled is not None
        return Conditioning(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))

    def entry_layers(self) -> list[EntryLayer]:
        """Those of cross-attention, and the layer that reads the pooled vector ahead of the codes of sizes."""
        first = self.entry("add_embedding.linear_1", "pooled")
        codes = 6 * self.denoiser.config.addition_time_embed_dim
        return [*super().entry_layers(), first._replace(columns=slice(first.module.in_features - codes))]

    @property
    def latents(self) -> Latents:
        """See `UNetBackbone.latents`."""
        config = self.pipe.vae.config
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise UnsupportedModelError(
                "the VAE has a mean and a spread for each of its channels (latents_mean, latents_std), which is not "
                "supported: use a VAE with one scaling_factor"
            )
        return super().latents

    def extra_inputs(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, object]:
        """The pooled vector, and that the picture was never cropped and has the size that is drawn."""
        assert conditioning.pooled is not None
        height, width = (side * self.pipe.vae_scale_factor for side in x_t.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x_t.device, dtype=x_t.dtype)
        added = {"text_embeds": conditioning.pooled.to(x_t.dtype), "time_ids": sizes.expand(len(x_t), -1)}
        return {"added_cond_kwargs": added}

    def decode(self, latents: Tensor) -> Tensor:
        """See `Backbone.decode`; a VAE that overflows in half precision decodes in float32."""
        vae = self.pipe.vae
        if vae.dtype != torch.float16 or not vae.config.force_upcast:
            return super().decode(latents)
        vae.to(torch.float32)
        try:
            return super().decode(latents.float())
        finally:
            vae.to(torch.float16)
