"""Round trips of weights through 8 and 4 bits: what is left of them after they were quantised and read again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen values of NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""
NF4_BLOCK = 64
"""Values that share a scale (as QLoRA has it)."""
INT4_GROUP = 128
"""Values of a row that share scale and zero (as GPTQ and AWQ have it)."""


class RoundTrip(NamedTuple):
    """A weight after a round trip through fewer bits."""

    value: Tensor
    """float32, shaped as it was."""
    codes: Tensor
    """The integers that would be stored, shaped as the weight."""


def int8(weight: Tensor) -> RoundTrip:
    """Round to symmetric integers of -127 to 127, with one scale per row: its largest value over 127.

    Args:
        weight: `(outputs, ...)`.
    """
    rows = weight.float().flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, rows / scale.clamp_min(torch.finfo(torch.float32).tiny), 0).round().clamp(-127, 127)
    return RoundTrip((codes * scale).view(weight.shape), codes.to(torch.int16).view(weight.shape))


def int4(weight: Tensor) -> RoundTrip:
    """Round to integers of 0 to 15, with a scale and a zero for each group of 128 values of a row.

    The range of a group holds 0, so that weights of exactly 0 stay so. The last group of a row may be shorter.

    Args:
        weight: `(outputs, ...)`.
    """
    rows = weight.float().flatten(1)
    groups, padding = _in_blocks(rows, INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    return _put_together((codes - zero) * scale, codes, rows, padding, weight)


def nf4(weight: Tensor) -> RoundTrip:
    """Round to the nearest of NF4's sixteen values, scaled by the largest value of each block of 64.

    Blocks go through the weight in order, across rows, as bitsandbytes has it.

    Args:
        weight: Of any shape.
    """
    flat = weight.float().reshape(1, -1)
    blocks, padding = _in_blocks(flat, NF4_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True)
    table = torch.tensor(NF4, device=weight.device)
    bounds = (table[1:] + table[:-1]) / 2
    inner = torch.where(scale > 0, blocks / scale.clamp_min(torch.finfo(torch.float32).tiny), 0)
    codes = torch.bucketize(inner.contiguous(), bounds)
    return _put_together(table[codes] * scale, codes, flat, padding, weight)


def _in_blocks(rows: Tensor, size: int) -> tuple[Tensor, int]:
    """Split rows into blocks `(rows, blocks, size)`, padded with zeros; give the number of zeros too."""
    size = min(size, rows.shape[1])
    padding = -rows.shape[1] % size
    return torch.nn.functional.pad(rows, (0, padding)).unflatten(1, (-1, size)), padding


def _put_together(value: Tensor, codes: Tensor, rows: Tensor, padding: int, weight: Tensor) -> RoundTrip:
    """Join blocks to the weight that they were cut from."""
    whole = [part.flatten(1)[:, : part.flatten(1).shape[1] - padding] for part in (value, codes)]
    assert whole[0].shape == rows.shape
    return RoundTrip(whole[0].reshape(weight.shape), whole[1].to(torch.int16).reshape(weight.shape))


FORMATS: dict[str, Callable[[Tensor], RoundTrip]] = {"int8": int8, "int4": int4, "nf4": nf4}
"""Formats by name."""
