"""Attenuation of low frequencies in a UNet's skip features (re-attention of SAFREE).

A filtered prompt is predicted together with the same prompt unfiltered. Where a low frequency of its features is
stronger than in the unfiltered row, it is multiplied by a factor below 1 (equation 8 of Yoon et al. 2024), in the
decoder blocks with the most channels and in those with the second most.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erasure.carriers.calls import NamedArguments
from erasure.interop import hooks, paths
from erasure.interop.protocols import Arguments

_HOOK = "erasure_skips"
NEAR_ZERO = 1
"""Frequencies on either side of the middle of the spectrum that count as low, as in FreeU."""


class Pairs(NamedTuple):
    """Rows of a pass, and the rows that each is compared with."""

    rows: Tensor
    """Indices of the rows, `(n,)` int64."""
    others: Tensor
    """Index of the row that each is compared with, `(n,)` int64."""
    factors: Tensor
    """Factors of attenuated features, `(n, 2)`: of those with the most channels, and with the second most."""


class _Pass(threading.local):
    """State of the denoiser pass that a thread runs."""

    pairs: Pairs | None = None


_PASS = _Pass()


def compare(pairs: Pairs | None) -> None:
    """Set which rows of this thread's next pass are compared; `None` ends the comparison."""
    _PASS.pairs = pairs


def attenuated(features: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Multiply the features' low frequencies by a factor where they are stronger than those of other features.

    Args:
        features: `(n, channels, height, width)`.
        others: The same of the rows that they are compared with.
        factors: `(n,)`.
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    spectrum, known = (
        torch.fft.fftshift(torch.fft.fftn(x.to(precise), dim=(-2, -1)), dim=(-2, -1)) for x in (features, others)
    )
    low = [slice(max(size // 2 - NEAR_ZERO, 0), size // 2 + NEAR_ZERO) for size in features.shape[-2:]]
    own = spectrum[..., low[0], low[1]]
    stronger = own.abs() > known[..., low[0], low[1]].abs()
    spectrum[..., low[0], low[1]] = torch.where(stronger, own * factors.to(precise).view(-1, 1, 1, 1), own)
    result = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real
    return result.to(features.dtype)


class _Attenuate(NamedArguments):
    """Hook on a decoder block that changes its skip features.

    Args:
        block: The block.
        stages: For each of its parts, first to last: 0 where its features are the widest, 1 where they have the second
            most channels, nothing elsewhere.
    """

    def __init__(self, block: nn.Module, stages: Sequence[int | None]) -> None:
        super().__init__(block)
        self.stages = tuple(stages)

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Change the compared rows of the pass."""
        pairs = _PASS.pairs
        if pairs is None:
            return args, kwargs
        arguments = self.by_name(args, kwargs)
        handed = list(arguments["res_hidden_states_tuple"])
        for index, stage in enumerate(self.stages):
            if stage is not None:
                # The first part takes the last.
                handed[-1 - index] = _changed(handed[-1 - index], pairs, stage)
        return self.as_called({**arguments, "res_hidden_states_tuple": tuple(handed)}, len(args))


def _changed(features: Tensor, pairs: Pairs, stage: int) -> Tensor:
    rows, others = (index.to(features.device) for index in (pairs.rows, pairs.others))
    factors = pairs.factors[:, stage].to(features.device)
    return features.index_copy(0, rows, attenuated(features[rows], features[others], factors))


def watch(denoiser: nn.Module, wanted: bool) -> None:
    """Put the hooks on a UNet's decoder, or remove them."""
    for block, stages in paths.decoder_parts(denoiser):
        known = hooks.find_hook(block, _HOOK) is not None
        if known and not wanted:
            hooks.remove_hook(block, _HOOK)
        elif wanted and not known and any(stage is not None for stage in stages):
            hooks.register_hook(block, _Attenuate(block, stages), _HOOK)


def is_watched(denoiser: nn.Module) -> bool:
    """Whether all hooks of `watch` are in place and run."""
    parts = [block for block, stages in paths.decoder_parts(denoiser) if any(stage is not None for stage in stages)]
    return bool(parts) and all(hooks.runs_hook(block, _HOOK) for block in parts)


def has_hooks(denoiser: nn.Module) -> bool:
    """Whether a UNet's decoder has any hook of `watch`."""
    return any(hooks.find_hook(block, _HOOK) is not None for block, _ in paths.decoder_parts(denoiser))
