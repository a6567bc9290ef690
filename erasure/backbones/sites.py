"""The attention layers of denoisers: UNets of Stable Diffusion and SDXL, transformers of SD3 and Flux."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from erasure.errors import UnsupportedModelError
from erasure.interop import paths

PATCH = 2
"""Latent pixels along a side of one token of SD3 and Flux."""


class AttentionSite(NamedTuple):
    """One attention layer of the denoiser."""

    name: str
    """Path inside the denoiser."""
    module: nn.Module
    kind: Literal["cross", "self", "joint"]
    downsampling: int
    """Latent pixels per token along one side: a 64x64 latent has 16x16 tokens at 4."""
    text: Literal["none", "first", "last"] = "none"
    """Position of the text tokens in the sequence of a joint attention."""

    @property
    def in_decoder(self) -> bool:
        """Whether it is in the decoder of a UNet; false in transformers."""
        return self.name.startswith("up_blocks.")

    @property
    def keys_and_values(self) -> list[str]:
        """Paths of the layers that compute its keys and values, of image and text."""
        return self._layers("to_k", "to_v", "add_k_proj", "add_v_proj")

    def text_only(self, denoiser: nn.Module) -> list[str]:
        """Paths of the modules of a joint attention and its block that process text only; none for other attention.

        Args:
            denoiser: Denoiser of this layer.
        """
        if self.kind != "joint":
            return []
        block = self.name.rpartition(".")[0]
        owner = paths.uncompiled(denoiser).get_submodule(block)
        behind = [f"{block}.ff_context"] if getattr(owner, "ff_context", None) is not None else []
        return [*self._layers("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), *behind]

    def _layers(self, *parts: str) -> list[str]:
        return [f"{self.name}.{part}" for part in parts if getattr(self.module, part, None) is not None]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of image tokens for a latent of `height` x `width`: what is left over makes a token too."""
        return -(-height // self.downsampling), -(-width // self.downsampling)


def attention_sites(denoiser: nn.Module) -> list[AttentionSite]:
    """Every attention layer of a denoiser that images pass through, in order of execution.

    Raises:
        UnsupportedModelError: The network is of another kind.
    """
    network = paths.uncompiled(denoiser)
    if isinstance(network, UNet2DConditionModel):
        return list(_unet_sites(network))
    if isinstance(network, SD3Transformer2DModel):
        return list(_sd3_sites(network))
    if isinstance(network, (FluxTransformer2DModel, ChromaTransformer2DModel)):
        return list(_flux_sites(network))
    raise UnsupportedModelError(
        f"the attention layers of {type(network).__name__} are not known; known: UNet2DConditionModel, "
        "SD3Transformer2DModel, FluxTransformer2DModel, ChromaTransformer2DModel"
    )


def _unet_sites(unet: UNet2DConditionModel) -> Iterator[AttentionSite]:
    """`attn1` is self-attention, `attn2` cross-attention, of every transformer block."""
    levels = len(unet.config.block_out_channels)
    # The class registers the middle last; a UNet may have none.
    for part in ("down_blocks", "mid_block", "up_blocks"):
        owner = getattr(unet, part, None)
        for path, module in () if owner is None else owner.named_modules():
            if isinstance(module, Attention) and path.endswith((".attn1", ".attn2")):
                kind: Literal["self", "cross"] = "self" if path.endswith(".attn1") else "cross"
                depth = levels - 1 if part == "mid_block" else int(path.split(".")[0])
                level = levels - 1 - depth if part == "up_blocks" else depth
                yield AttentionSite(f"{part}.{path}", module, kind, 2**level)


def _sd3_sites(transformer: SD3Transformer2DModel) -> Iterator[AttentionSite]:
    """Image tokens first, then text; some blocks of SD3.5 have a self-attention of the image besides."""
    for index, block in enumerate(transformer.transformer_blocks):
        path = f"transformer_blocks.{index}"
        yield AttentionSite(f"{path}.attn", block.attn, "joint", PATCH, "last")
        if block.attn2 is not None:
            yield AttentionSite(f"{path}.attn2", block.attn2, "self", PATCH)


def _flux_sites(transformer: FluxTransformer2DModel) -> Iterator[AttentionSite]:
    """Text tokens first, then the image's, in the double blocks and in the single ones."""
    for part in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(transformer, part)):
            yield AttentionSite(f"{part}.{index}.attn", block.attn, "joint", PATCH, "first")
