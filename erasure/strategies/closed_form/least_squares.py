"""Regularised least squares for the change of a linear layer (UCE, arXiv 2308.14761), and its low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor

from erasure.carriers.edits import LowRank
from erasure.errors import DivergenceError


def solve(
    erased: Tensor,
    replacing: Tensor,
    preserved: Tensor,
    erase_scale: float,
    preserve_scale: float,
    regularisation: float,
) -> Tensor:
    """Solve UCE's closed form for the matrix X with `W' - W = W X`.

    Args:
        erased: Features c_e to erase, `(e, dim)`.
        replacing: Features c_a that replace them, `(e, dim)`.
        preserved: Features c_p to preserve, `(p, dim)`.
        erase_scale: Weight s_e of an erased feature.
        preserve_scale: Weight s_p of a preserved feature.
        regularisation: lambda > 0, the weight of the squared change.

    Returns:
        X, `(dim, dim)`, of rank at most e.
    """
    gram = _gram(erased, preserved, erase_scale, preserve_scale, regularisation)
    cross = erase_scale * (replacing - erased).T @ erased
    return solved(gram, cross.T).T


def outputs_added(inputs: Tensor, outputs: Tensor, preserved: Tensor, regularisation: float) -> Tensor:
    """Compute the change of a weight that adds given outputs at given inputs; all scales are 1.

    Args:
        inputs: Inputs at which something is added, `(e, dim)`.
        outputs: What is added at each input, `(e, out)`.
        preserved: Inputs at which nothing is added, `(p, dim)`.
        regularisation: lambda > 0, the weight of the squared change.

    Returns:
        Change of the weight, `(out, dim)`.
    """
    gram = _gram(inputs, preserved, 1.0, 1.0, regularisation)
    return solved(gram, inputs.T @ outputs).T


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve `matrix @ solution = right` for the solution `(dim, n)`.

    Raises:
        DivergenceError: The matrix `(dim, dim)` is singular.
    """
    try:
        return torch.linalg.solve(matrix, right)
    except torch.linalg.LinAlgError as error:
        raise DivergenceError(
            "the closed form has no single solution: its matrix is singular. Raise regularisation"
        ) from error


def _gram(
    erased: Tensor, preserved: Tensor, erase_scale: float, preserve_scale: float, regularisation: float
) -> Tensor:
    """`sum_e s_e c_e c_e^T + sum_p s_p c_p c_p^T + lambda I`, `(dim, dim)`."""
    gram = erase_scale * erased.T @ erased + preserve_scale * preserved.T @ preserved
    return gram + regularisation * torch.eye(erased.shape[1], dtype=erased.dtype)


def factors(update: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise a matrix as `left @ right` of its numerical rank, `(dim, rank)` and `(rank, dim)`.

    Raises:
        DivergenceError: The matrix holds NaN or infinity.
    """
    if not torch.isfinite(update).all():
        raise DivergenceError(
            "the closed form gives NaN or infinity: are the model's weights sound? Raise regularisation"
        )
    left, singular, right = torch.linalg.svd(update)
    rank = max(int((singular > 1e-7 * singular[0]).sum()), 1)
    return left[:, :rank] * singular[:rank], right[:rank]


def compress(edit: LowRank) -> LowRank:
    """Give float32 factors of the same product, with a rank of at most the number of the layer's outputs."""
    down, up = edit
    if up.shape[0] < down.shape[0]:
        up, down = torch.eye(up.shape[0], dtype=up.dtype), up @ down
    return LowRank(down.float().contiguous(), up.float().contiguous())
