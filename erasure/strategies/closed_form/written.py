"""How changes of linear layers are kept: as a LoRA, or as maps of what the layers read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import EntryLayer
from erasure.carriers.edits import InputMap, LowRank
from erasure.strategies.closed_form.shortened import low_rank, shortened_map

LARGEST_LORA = 1_000_000
"""Bytes a concept that a LoRA may take in the place of one common map."""


class Change(NamedTuple):
    """What becomes of layers that read one part of the conditioning: `W' = W + W left right` in each."""

    layers: Sequence[EntryLayer]
    weights: Sequence[Tensor]
    """Their columns that read it, `(out, dim)` float64."""
    left: Tensor
    """`(dim, rank)` float64."""
    right: Tensor
    """`(rank, dim)` float64."""
    features: Tensor
    """`(n, dim)` float64: what is erased, takes its place or is preserved."""

    def shortened(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Factors `up` `(dim, rank)` and `down` `(rank, dim)` for all layers alike; see `shortened_map`."""
        return shortened_map(self.left, self.right, self.weights, self.features, tolerance)


def as_loras(changes: Sequence[Change], tolerance: float) -> dict[str, LowRank]:
    """A LoRA pair for every layer, by the layer's key."""
    made = {}
    for change in changes:
        for layer, weight in zip(change.layers, change.weights, strict=True):
            pair = low_rank(weight @ change.left, change.right, change.features, tolerance)
            made[layer.key] = pair._replace(down=widened(pair.down, layer))
    return made


def as_maps(changes: Sequence[Change], factors: Sequence[tuple[Tensor, Tensor]]) -> dict[str, InputMap]:
    """A map for every layer, by the layer's key; those of one change share their tensors, which are kept once.

    Args:
        changes: What becomes of the layers.
        factors: Of each change, the factors `up` and `down` that are kept.
    """
    made = {}
    for change, (up, down) in zip(changes, factors, strict=True):
        wide_down, wide_up = widened(down, change.layers[0]), widened(up, change.layers[0], axis=0)
        for layer in change.layers:
            made[layer.key] = InputMap(wide_down, wide_up, torch.tensor(len(layer.module.weight)))
    return made


def lora_bytes(changes: Sequence[Change], factors: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Bytes that LoRA pairs would take. A layer's own factors are as long as the common ones, or a little shorter."""
    return sum(
        len(down) * sum(layer.module.weight.shape) * down.element_size()
        for change, (_, down) in zip(changes, factors, strict=True)
        for layer in change.layers
    )


def widened(matrix: Tensor, layer: EntryLayer, axis: int = 1) -> Tensor:
    """A matrix over the columns of a layer that read text, with zeros for those that read something else.

    Args:
        matrix: As long along an axis as there are columns that read text.
        layer: The layer.
        axis: That axis.
    """
    if layer.columns == slice(None):
        return matrix
    length = layer.module.weight.shape[1]
    places = torch.arange(length)[layer.columns]
    shape = [length, matrix.shape[1]] if axis == 0 else [matrix.shape[0], length]
    return matrix.new_zeros(shape).index_copy(axis, places, matrix)
