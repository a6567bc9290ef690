"""Stable Diffusion 3 and 3.5: two CLIP text towers side by side, T5 behind them where it is there, both pooled."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones.base import TokenRun
from erasure.backbones.conditioning import Conditioning
from erasure.backbones.flow_matching import PATCH, FlowMatchingBackbone
from erasure.backbones.latents import Latents
from erasure.backbones.layouts import Layout, sd3_layout, sd3_layout_of
from erasure.backbones.towers import SD3_LENGTH, TowerOutput
from erasure.interop.protocols import Denoiser

FIRST, SECOND, THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"


class StableDiffusion3Backbone(FlowMatchingBackbone):
    """Any pipeline with an `SD3Transformer2DModel` and two CLIPs, with a T5 or without."""

    family = "stable-diffusion-3"
    network = SD3Transformer2DModel
    required = (FIRST, SECOND)
    even_levels = False

    @classmethod
    def published_layout(cls, denoiser: Denoiser | None) -> Layout:
        """Stability AI's."""
        return sd3_layout(None if denoiser is None else denoiser.config.num_layers)

    @classmethod
    def layout_of(cls, names: Collection[str]) -> Layout:
        """See `Backbone.layout_of`."""
        return sd3_layout_of(names)

    @property
    def token_runs(self) -> list[TokenRun]:
        """Those of both CLIPs, which read the same tokens, and behind them T5's; without T5 zeros stand there."""
        towers = {tower.component: tower for tower in self.towers}
        behind = towers[FIRST].max_length
        clips = TokenRun((towers[FIRST], towers[SECOND]), tokens=behind)
        return [clips, TokenRun((towers[THIRD],), behind)] if THIRD in towers else [clips]

    def compose(self, parts: Mapping[str, TowerOutput]) -> Conditioning:
        """The states of both CLIPs side by side, as wide as T5's by zeros, then T5's; and both pooled vectors."""
        first, second = parts[FIRST], parts[SECOND]
        assert first.pooled is not None
        assert second.pooled is not None
        clips = torch.cat([first.states, second.states], -1)
        width = self.denoiser.config.joint_attention_dim
        if THIRD in parts:
            behind = parts[THIRD].states
        else:
            behind = clips.new_zeros(len(clips), self.length or SD3_LENGTH, width)
        padded = F.pad(clips, (0, width - clips.shape[-1]))
        return Conditioning(torch.cat([padded, behind], 1), torch.cat([first.pooled, second.pooled], -1))

    @property
    def latents(self) -> Latents:
        """As the transformer takes them, two by two, and the VAE reads them."""
        transformer, config = self.denoiser.config, self.pipe.vae.config
        side = transformer.sample_size
        latents = Latents(
            transformer.in_channels, (side, side), self.pipe.vae_scale_factor, config.scaling_factor,
            config.shift_factor or 0.0, PATCH,
        )  # fmt: skip
        return latents.of_size(self.size)

    def predict(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: float | Tensor | None = None
    ) -> Tensor:
        """See `Backbone.predict`; no model of this family is told its guidance."""
        assert conditioning.pooled is not None
        return self.denoiser(
            hidden_states=x_t, timestep=t.to(x_t.device, torch.float32).expand(len(x_t)),
            encoder_hidden_states=conditioning.tokens.to(x_t.dtype),
            pooled_projections=conditioning.pooled.to(x_t.dtype),
        ).sample  # fmt: skip
