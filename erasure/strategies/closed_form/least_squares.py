"""The closed form itself: regularised least squares for the change of a linear layer, and its low-rank factors."""

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
    """The matrix X with `W' - W = W X`.

    Args:
        erased: `(e, dim)` features c_e.
        replacing: `(e, dim)` features c_a.
        preserved: `(p, dim)` features c_p.
        erase_scale: s_e.
        preserve_scale: s_p.
        regularisation: lambda > 0.

    Returns:
        `(dim, dim)`, of rank at most e.
    """
    gram = _gram(erased, preserved, erase_scale, preserve_scale, regularisation)
    cross = erase_scale * (replacing - erased).T @ erased
    return solved(gram, cross.T).T


def outputs_added(inputs: Tensor, outputs: Tensor, preserved: Tensor, regularisation: float) -> Tensor:
    """The change of a weight that adds outputs at some inputs, with all scales 1.

    Args:
        inputs: `(e, dim)`.
        outputs: `(e, out)`, what is added at each.
        preserved: `(p, dim)` inputs where nothing is added.
        regularisation: lambda > 0.

    Returns:
        `(out, dim)`.
    """
    gram = _gram(inputs, preserved, 1.0, 1.0, regularisation)
    return solved(gram, inputs.T @ outputs).T


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution `(dim, n)` of `matrix @ solution = right`.

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
    """The least factors `left @ right` of a matrix, `(dim, rank)` and `(rank, dim)`.

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
    """Give factors of the same product in float32, in no more columns than the layer has outputs."""
    down, up = edit
    if up.shape[0] < down.shape[0]:
        up, down = torch.eye(up.shape[0], dtype=up.dtype), up @ down
    return LowRank(down.float().contiguous(), up.float().contiguous())
