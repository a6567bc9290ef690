"""Stable Diffusion 1.x and 2.x: one CLIP text tower, a UNet with cross-attention, epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from erasure.backbones.base import TokenRun
from erasure.backbones.conditioning import Conditioning
from erasure.backbones.towers import TowerOutput
from erasure.backbones.unet import UNetBackbone
from erasure.interop import paths
from erasure.interop.encoders import anatomy_of


class StableDiffusionBackbone(UNetBackbone):
    """Any pipeline with a `UNet2DConditionModel`, one CLIP text encoder and a VAE."""

    family = "stable-diffusion"

    @classmethod
    def matches(cls, pipe: DiffusionPipeline) -> bool:
        """One text encoder of CLIP's make and a UNet: SDXL has two, SD3 and Flux a transformer."""
        parts = pipe.components
        encoder = parts.get("text_encoder")
        return (
            isinstance(parts.get("unet"), nn.Module)
            and isinstance(paths.uncompiled(parts["unet"]), UNet2DConditionModel)
            and isinstance(encoder, nn.Module)
            and (anatomy := anatomy_of(paths.transformer_root(encoder))) is not None
            and anatomy.causal
            and "text_encoder_2" not in parts
        )

    @property
    def token_runs(self) -> list[TokenRun]:
        """The one text encoder's."""
        return [TokenRun(tuple(self.towers))]

    def compose(self, parts: Mapping[str, TowerOutput]) -> Conditioning:
        """The final hidden states of the text encoder."""
        (output,) = parts.values()
        return Conditioning(output.states)
