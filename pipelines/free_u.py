"""FreeU (Si et al. 2023, arXiv 2309.11497) as the code of Attentive Eraser registers it.

diffusers' `enable_freeu` changes the first two blocks of the decoder, the first with `b1` and `s1` and the second with
`b2` and `s2`. That code chooses by width instead: layers with as many channels as the innermost ones (1280 in Stable
Diffusion) get `b1` and `s1`, layers with half as many `b2` and `s2`, in any block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor, nn

from erasure.errors import UnsupportedModelError
from erasure.interop import hooks, paths
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Arguments, Denoiser

_FREE_U = "erasure_free_u"


class FreeU(NamedTuple):
    """Factors of FreeU."""

    s1: float
    """Factor of the low frequencies of skip features beside the widest features."""
    s2: float
    """Factor of the low frequencies of skip features beside features half as wide."""
    b1: float
    """Factor of the first half of the widest features."""
    b2: float
    """Factor of the first half of features half as wide."""


@contextmanager
def free_u(denoiser: Denoiser, factors: FreeU | None) -> Iterator[None]:
    """Switch FreeU on inside of the block; do nothing for `None`.

    Args:
        denoiser: The denoiser.
        factors: See `FreeU`.

    Raises:
        UnsupportedModelError: diffusers' own FreeU is on already, or the denoiser is a transformer.
    """
    if factors is None:
        yield
        return
    unet = cast(Denoiser, paths.uncompiled(denoiser))
    if unet.config.get("up_block_types") is None:
        raise UnsupportedModelError(
            f"FreeU scales the decoder of a UNet, which {type(unet).__name__} lacks: leave it out"
        )
    if paths.has_free_u(unet):
        raise UnsupportedModelError("FreeU is on already, and the preset brings its own: pipe.disable_freeu() first")
    widest = unet.config.block_out_channels[-1]
    with ExitStack() as stack:
        width = widest
        for block in cast(nn.ModuleList, unet.up_blocks):
            for layer in cast(nn.ModuleList, block.resnets):
                chosen = {widest: (factors.b1, factors.s1), widest // 2: (factors.b2, factors.s2)}.get(width)
                if chosen is not None:
                    stack.enter_context(hooks.hooked(layer, _Scale(width, *chosen), _FREE_U))
                width = cast(int, layer.out_channels)
        yield


class _Scale(ModelHook):
    """Hook on a decoder layer, whose input is `width` backbone features and then those of the skip connection."""

    def __init__(self, width: int, backbone: float, skip: float) -> None:
        super().__init__()
        self.width, self.backbone, self.skip = width, backbone, skip

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Scale the first half of the features, and the low frequencies of the skip connection."""
        first: Tensor = args[0]
        own, beside = first[:, : self.width], first[:, self.width :]
        half = self.width // 2
        own = torch.cat([self.backbone * own[:, :half], own[:, half:]], 1)
        beside = fourier_filter(beside, threshold=1, scale=self.skip)
        return (torch.cat([own, beside], 1), *args[1:]), kwargs
