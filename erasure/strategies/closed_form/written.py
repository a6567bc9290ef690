"""How changes of linear layers are saved: as a LoRA, or as maps of the layers' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import EntryLayer
from erasure.carriers.edits import InputMap, LowRank
from erasure.strategies.closed_form.shortened import low_rank, shortened_map

LARGEST_LORA = 1_000_000
"""Bytes per concept up to which a LoRA is saved instead of one common map."""


class Change(NamedTuple):
    """The change of all layers that read one part of the conditioning: `W' = W + W left right` in each layer."""

    layers: Sequence[EntryLayer]
    weights: Sequence[Tensor]
    """Weight columns of each layer that read it, `(out, dim)` float64."""
    left: Tensor
    """Left factor, `(dim, rank)` float64."""
    right: Tensor
    """Right factor, `(rank, dim)` float64."""
    features: Tensor
    """Erased, replacing and preserved features, on which errors are measured, `(n, dim)` float64."""

    def shortened(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Compute factors `up` `(dim, rank)` and `down` `(rank, dim)` for all layers; see `shortened_map`."""
        return shortened_map(self.left, self.right, self.weights, self.features, tolerance)


def as_loras(changes: Sequence[Change], tolerance: float) -> dict[str, LowRank]:
    """Give a LoRA pair for every layer, by the layer's key."""
    made = {}
    for change in changes:
        for layer, weight in zip(change.layers, change.weights, strict=True):
            pair = low_rank(weight @ change.left, change.right, change.features, tolerance)
            made[layer.key] = pair._replace(down=widened(pair.down, layer))
    return made


def as_maps(changes: Sequence[Change], factors: Sequence[tuple[Tensor, Tensor]]) -> dict[str, InputMap]:
    """Give an input map for every layer, by the layer's key. Maps of one change share their tensors.

    Args:
        changes: Changes of the layers.
        factors: The saved factors `up` and `down` of each change.
    """
    made = {}
    for change, (up, down) in zip(changes, factors, strict=True):
        wide_down, wide_up = widened(down, change.layers[0]), widened(up, change.layers[0], axis=0)
        for layer in change.layers:
            made[layer.key] = InputMap(wide_down, wide_up, torch.tensor(len(layer.module.weight)))
    return made


def lora_bytes(changes: Sequence[Change], factors: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Estimate the bytes of LoRA pairs: a layer's own factors are as long as the common ones, or shorter."""
    return sum(
        len(down) * sum(layer.module.weight.shape) * down.element_size()
        for change, (_, down) in zip(changes, factors, strict=True)
        for layer in change.layers
    )


def widened(matrix: Tensor, layer: EntryLayer, axis: int = 1) -> Tensor:
    """Extend a matrix over a layer's text columns to all of its columns, with zeros elsewhere.

    Args:
        matrix: A matrix with one entry per text column along `axis`.
        layer: The layer.
        axis: Axis of the matrix that runs over the text columns.
    """
    if layer.columns == slice(None):
        return matrix
    length = layer.module.weight.shape[1]
    places = torch.arange(length)[layer.columns]
    shape = [length, matrix.shape[1]] if axis == 0 else [matrix.shape[0], length]
    return matrix.new_zeros(shape).index_copy(axis, places, matrix)
