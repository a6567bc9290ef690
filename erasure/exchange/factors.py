"""Edits of weights as pairs of low-rank factors, exact where they are of low rank and by their SVD where not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.carriers.edits import Edits
from erasure.carriers.weights import delta_of
from erasure.errors import OptionError, UnsupportedModelError

RESIDUAL = 1e-4
"""Share of an edit's energy (its squared norm) that its factors may leave out: one per cent of its norm."""
TOKEN_TABLES = ("token_embedding.weight", "embed_tokens.weight", "shared.weight")
"""Ends of the paths of tables of tokens."""
TABLES = (*TOKEN_TABLES, "position_embedding.weight")
"""Ends of the paths of tables, which are looked up: no program adds a LoRA to them."""


class Factors(NamedTuple):
    """The edit of one layer, `up @ down`."""

    down: Tensor
    """Factor that reads the input, `(rank, in_features)`; of a convolution `(rank, in_channels, height, width)`."""
    up: Tensor
    """Factor that gives the output, `(out_features, rank)`; of a convolution `(out_channels, rank, 1, 1)`."""
    energy: float = 0.0
    """Squared norm of a full-rank edit; 0 where the factors are the edit itself."""
    left_out: float = 0.0
    """Squared norm of the part of the edit that the factors leave out."""

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.down.shape[0]


class Split(NamedTuple):
    """The weight edits of an erasure, split by what a LoRA file can contain."""

    layers: dict[str, Factors]
    """By `component/module.path`."""
    plain: dict[str, Tensor]
    """By `component/module.path.parameter`: biases, scales of norms and tables, which have no low-rank form."""
    whole: dict[str, Tensor]
    """By `component/module.path`: full-rank edits of weights that stay as they are."""


def split(
    edits: Edits, bases: Mapping[str, Tensor], rank: int | None = None, residual: float = RESIDUAL, *,
    whole: bool = False,
) -> Split:  # fmt: skip
    """Convert the edits of an erasure to factors.

    Args:
        edits: Weight edits.
        bases: Base weights of the layers whose input is mapped, by `component/module.path`.
        rank: Largest rank for a full-rank edit; as `residual` needs when left out.
        residual: Share of the energy of a full-rank edit that its factors may leave out.
        whole: Leave full-rank edits as they are, for what holds them in that form.

    Raises:
        OptionError: A rank below one, or a residual that is no share.
        UnsupportedModelError: An input map whose base weight is not given.
    """
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank} is not possible: give a whole number from 1 up, or leave it out")
    if not 0 <= residual < 1:
        raise OptionError(f"a residual of {residual} is no share of the energy: give a number from 0 to below 1")
    layers = {key: Factors(edit.down, edit.up) for key, edit in edits.low_rank.items()}
    for key, edit in edits.maps.items():
        if key not in bases:
            raise UnsupportedModelError(
                f"the edit of {key!r} is a change of what the layer reads, and what that makes of the weight depends "
                "on the weight: name the base model (--model)"
            )
        layers[key] = Factors(edit.down.float(), bases[key].detach().float().cpu() @ edit.up.float().cpu())
    plain, kept = {}, {}
    for key, delta in edits.deltas.items():
        if delta.ndim in (2, 4) and key.endswith(".weight") and not key.endswith(TABLES):
            if delta.any() and whole:
                kept[key.removesuffix(".weight")] = delta
            elif delta.any():
                layers[key.removesuffix(".weight")] = decomposed(delta, rank, residual)
        elif delta.any():
            plain[key] = delta
    return Split(layers, plain, kept)


def decomposed(delta: Tensor, rank: int | None, residual: float) -> Factors:
    """Compute the best low-rank approximation of a full-rank edit.

    Args:
        delta: `(out_features, in_features)`, or `(out_channels, in_channels, height, width)`.
        rank: The most ranks; as many as `residual` asks for when `None`.
        residual: Share of the energy that may be left out.
    """
    flat = delta_of(delta).flatten(1).double()
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    energies = values.square()
    whole = float(energies.sum())
    behind = energies.flip(0).cumsum(0).flip(0)
    # How much is left out with 1, 2, ... ranks.
    left_out = torch.cat([behind[1:], behind.new_zeros(1)])
    count = int((left_out > residual * whole).sum()) + 1
    count = min(count, len(values)) if rank is None else min(count, rank, len(values))
    root = values[:count].sqrt()
    dtype = delta.dtype if delta.dtype in (torch.float16, torch.bfloat16) else torch.float32
    down, up = (root[:, None] * right[:count]).to(dtype), (left[:, :count] * root).to(dtype)
    if delta.ndim == 4:
        down, up = down.view(count, *delta.shape[1:]), up[:, :, None, None]
    return Factors(down, up, whole, float(left_out[count - 1]))
