"""Arithmetic of latents, most of which are 0: what fires is computed with, and nothing else is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fired(NamedTuple):
    """Active latents of a batch of activations."""

    latents: Tensor
    """Values of the latents that are given, `(batch, tokens, given)`."""
    fires: Tensor
    """1 where the latent fires, else 0, shaped the same."""
    which: Tensor | None
    """Indices of these latents among all, `(given,)`; `None` when all are given."""


def fired(before: Tensor, level: Tensor, whole: bool) -> Fired:
    """Find the latents of a JumpReLU that are active on any token; all latents where half of them are.

    Args:
        before: Pre-activations, `(batch, tokens, features)`.
        level: Threshold of each latent, `(features,)`, at least 0.
        whole: Give all latents, whichever fire. In a compiled graph all are given in any case.
    """
    on = before > level
    if not (whole or torch.compiler.is_compiling()):
        which = on.flatten(0, -2).any(0).nonzero()[:, 0]
        if 2 * len(which) < len(level):
            return Fired(*_jumped(before[..., which], on[..., which]), which)
    return Fired(*_jumped(before, on), None)


def product(sparse: Tensor, matrix: Tensor, which: Tensor | None = None) -> Tensor:
    """Compute `sparse @ matrix` without the rows that are multiplied by zeros only; few concepts are in a prompt.

    Args:
        sparse: `(..., rows)`, most of it 0.
        matrix: `(rows, columns)`.
        which: The rows of the matrix that `sparse` is about, fewer than half of them; all when left out.
    """
    if sparse.requires_grad or torch.compiler.is_compiling():
        return sparse @ matrix
    met = sparse.flatten(0, -2).any(0).nonzero()[:, 0]
    if which is not None:
        return sparse[..., met] @ matrix[which[met]]
    # Gathering rows costs more than it saves where most are met.
    return sparse[..., met] @ matrix[met] if 2 * len(met) < len(matrix) else sparse @ matrix


def alike(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Find columns that are the same, `(rows, columns)`.

    Returns:
        The first place of each that differs, in their order; and for every column which of these it is.
    """
    known: dict[bytes, int] = {}
    first: list[int] = []
    which: list[int] = []
    for index, column in enumerate(columns.T.contiguous().cpu().numpy()):
        number = known.setdefault(column.tobytes(), len(known))
        if number == len(first):
            first.append(index)
        which.append(number)
    both = (torch.tensor(each, dtype=torch.int64, device=columns.device) for each in (first, which))
    return next(both), next(both)


def _jumped(before: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Give latents that are `before` where they are `on` and 0 elsewhere, and 1 and 0 at the same places.

    A product takes a quarter of the time of a choice between two tensors. What is below 0 is never on.
    """
    fires = on.to(before.dtype)
    return before.clamp(min=0) * fires, fires
