"""Compression of the changes of linear layers: lower rank and float16, while their effect on given features stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from erasure.carriers.edits import LowRank
from erasure.strategies.closed_form.least_squares import compress

RESERVE = 0.8
"""Share of the tolerance that dropping directions may use; rounding to float16 uses some of the rest."""
TINY = 1e-30
"""Norm below which a direction or an effect counts as zero."""


def shortened_map(
    left: Tensor, right: Tensor, weights: Sequence[Tensor], features: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Shorten the change `W X` of several layers that read the same input, where `X = left @ right`.

    Args:
        left: `(dim, rank)` float64.
        right: `(rank, dim)` float64.
        weights: Weight of each layer, `(out, dim)` float64.
        features: Features on which the error is measured, `(n, dim)` float64.
        tolerance: Largest relative error of each layer's change over all features; 0 keeps everything.

    Returns:
        Factors `up` `(dim, rank)` and `down` `(rank, dim)`: in float16 if that is within the tolerance, else in
        float32.
    """
    if not tolerance:
        return left.float().contiguous(), right.float().contiguous()
    x, gram = left @ right, features.T @ features
    effects = [_energy(weight, x, gram) for weight in weights]
    metric = sum((weight.T @ weight / max(effect, TINY) for weight, effect in zip(weights, effects, strict=True)),
                 torch.zeros_like(x))  # fmt: skip
    half, inverse = _root(metric)
    directions, singular = _principal(half @ x, gram)

    def made(kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _rounded(inverse @ kept, kept.T @ half @ x, gram, dtype)

    def near(up: Tensor, down: Tensor) -> bool:
        error = x - up.double() @ down.double()
        return all(_energy(w, error, gram) <= tolerance**2 * e for w, e in zip(weights, effects, strict=True))

    return _shortest(directions, singular, tolerance, made, near) or (
        left.float().contiguous(), right.float().contiguous(),
    )  # fmt: skip


def low_rank(left: Tensor, right: Tensor, features: Tensor, tolerance: float) -> LowRank:
    """Shorten the change `left @ right` of one layer, as a LoRA holds it.

    Args:
        left: `(out, rank)` float64.
        right: `(rank, dim)` float64.
        features: Features on which the error is measured, `(n, dim)` float64.
        tolerance: Largest relative error of the change over all features; 0 keeps everything.

    Returns:
        The factors: in float16 if that is within the tolerance, else in float32.
    """
    if not tolerance:
        return compress(LowRank(right, left))
    change = left @ right
    gram = features.T @ features
    identity = torch.eye(len(change), dtype=change.dtype)
    effect = _energy(identity, change, gram)
    directions, singular = _principal(change, gram)

    def made(kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _rounded(kept, kept.T @ change, gram, dtype)

    def near(up: Tensor, down: Tensor) -> bool:
        return _energy(identity, change - up.double() @ down.double(), gram) <= tolerance**2 * effect

    pair = _shortest(directions, singular, tolerance, made, near)
    return compress(LowRank(right, left)) if pair is None else LowRank(pair[1], pair[0])


def _shortest(
    directions: Tensor, singular: Tensor, tolerance: float,
    made: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]], near: Callable[[Tensor, Tensor], bool],
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Find the factors (up, down) of least rank within the tolerance, float16 before float32; else give `None`.

    Args:
        directions: Output directions, the most important first, `(out, n)`.
        singular: Singular value of each direction, `(n,)`.
        tolerance: Share of the whole change that may be left out.
        made: Computes factors from the kept directions in a given precision.
        near: Says whether factors are within the tolerance.
    """
    for dtype in (torch.float16, torch.float32):
        rank = _rank(singular, RESERVE * tolerance)
        while rank:
            pair = made(directions[:, :rank], dtype)
            if near(*pair):
                return pair
            rank = 0 if rank == len(singular) else min(len(singular), rank + max(1, rank // 10))
    return None


def _energy(weight: Tensor, change: Tensor, gram: Tensor) -> float:
    """Compute `sum_c |W change c|^2` over features c with the given Gram matrix."""
    return float(((weight @ (change @ gram @ change.T)) * weight).sum().clamp_min(0))


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the symmetric square root of a positive matrix, and its inverse.

    Eigenvalues of the root are raised to at least 1e-6 of the largest one.
    """
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-12 * values[-1]).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _principal(change: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Compute orthonormal output directions `(out, n)`, and how far a change moves features along each, `(n,)`."""
    values, vectors = torch.linalg.eigh(change @ gram @ change.T)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


def _rank(singular: Tensor, tolerance: float) -> int:
    """Number of directions, at least 1, after which the rest is a share of at most `tolerance` of the whole."""
    rest = singular.flip(0).square().cumsum(0).flip(0).sqrt()
    return max(1, int((rest > tolerance * rest[0]).sum()))


def _rounded(up: Tensor, down: Tensor, gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round factors of a product so that the effect on the features changes little; both factors get equal norms.

    The rounding error of one input of `down` is compensated by the inputs that are rounded later, as far as the
    features use both (error feedback along the Cholesky factor of the inverse Gram matrix). Rounding each input alone
    would change preserved features most, because large parts of the change cancel for them.
    """
    ratio = (down.norm(dim=1).clamp_min(TINY) / up.norm(dim=0).clamp_min(TINY)).sqrt()
    up, down = (up * ratio).to(dtype), down / ratio[:, None]
    if dtype != torch.float16:
        return up.contiguous(), down.to(dtype).contiguous()
    order = gram.diagonal().argsort(descending=True)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    lifted = gram + 1e-6 * gram.diagonal().mean().clamp_min(TINY) * identity
    # The upper Cholesky factor U of G = U U^T gives G^-1 = V^T V with V = U^-1, without inverting G.
    root = torch.linalg.cholesky(lifted[order][:, order].flip(0, 1)).flip(0, 1)
    factor = torch.linalg.solve_triangular(root, identity, upper=True)
    wanted, rounded = down[:, order].clone(), torch.empty(down.shape, dtype=dtype)
    for place, column in enumerate(order.tolist()):
        rounded[:, column] = wanted[:, place].to(dtype)
        missed = (wanted[:, place] - rounded[:, column]) / factor[place, place]
        wanted[:, place + 1 :] -= missed[:, None] * factor[place, place + 1 :]
    return up.contiguous(), rounded
