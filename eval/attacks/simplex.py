"""Points on the simplex of a vocabulary: tokens that a gradient can move. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(rows: int, size: int) -> Tensor:
    """The centre of the simplex, `(rows, size)` float32."""
    return torch.full((rows, size), 1 / size)


def project(points: Tensor) -> Tensor:
    r"""The nearest points of the simplex.

    For a row $v$ sorted in falling order $u$, with $\rho$ the last index at which
    $u_\rho > (\sum_{i \le \rho} u_i - 1) / \rho =: \tau$, they are $\max(v - \tau, 0)$ (Held et al. 1974; Duchi et al.
    2008, algorithm 1). Exact, where the released code of UnlearnDiffAtk bisects to 1e-5.

    Args:
        points: `(..., size)`, finite.

    Returns:
        The same shape and dtype: entries in 0-1 that sum to 1 along the last dimension.
    """
    values = points.double()
    ordered = values.sort(dim=-1, descending=True).values
    count = torch.arange(1, values.shape[-1] + 1, device=values.device)
    shift = (ordered.cumsum(-1) - 1) / count
    last = (ordered > shift).sum(-1, keepdim=True) - 1
    return (values - shift.gather(-1, last)).clamp(0, 1).to(points.dtype)


def draw(simplex: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sample one index from every row, `count` times over: `(count, rows)` int64.

    Args:
        simplex: `(rows, size)`, on the generator's device.
        count: How often.
        generator: Where the randomness comes from.
    """
    return torch.multinomial(simplex, count, replacement=True, generator=generator).T


def straight_through(slope: Tensor, table: Tensor) -> Tensor:
    """Gradient by the simplex of a loss that was computed with sampled tokens.

    A sampled row is a one-hot vector times the embedding table. Its gradient is taken for that of the point it was
    drawn from, each entry kept within [-1, 1] (hardtanh, as the released code of UnlearnDiffAtk).

    Args:
        slope: Gradient by the sampled embeddings, `(count, rows, dim)`.
        table: Embeddings of the tokens, `(size, dim)`.

    Returns:
        `(rows, size)`, summed over the draws.
    """
    return (slope @ table.T).clamp(-1, 1).sum(0)
