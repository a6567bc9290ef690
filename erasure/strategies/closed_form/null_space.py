"""Arithmetic of closed forms that change a layer only where nothing that is kept goes."""

from __future__ import annotations

import torch
from torch import Tensor

from erasure.strategies.closed_form.least_squares import solved


def null_space(covariance: Tensor, threshold: float) -> Tensor:
    """The projection onto directions in which there is next to nothing, `(dim, dim)`.

    Args:
        covariance: Mean of the outer products of what is kept, `(dim, dim)`.
        threshold: Eigenvalue below which a direction belongs to them.
    """
    values, vectors = torch.linalg.eigh(covariance)
    free = vectors[:, values < threshold]
    return free @ free.T


def constrained(erased: Tensor, space: Tensor, invariant: Tensor, regularisation: float, leniency: float) -> Tensor:
    """The right factor of the closed form in a null space that keeps invariants.

    The change `D P` of a layer that minimises `|(W + D P) C_1 - W C_*|^2 + s |D P|^2` under `D P C_2 = 0` is
    `W (C_* - C_1) C_1^T P Q M` with `M = (C_1 C_1^T P + s I)^-1` and
    `Q = I - M C_2 (C_2^T P M C_2 + l I)^-1 C_2^T P`. This gives `C_1^T P Q M`, computed as what it is: with l of 0 the
    same ridge in the part of the null space that no invariant reaches, and else a ridge with weights of `1 / l` on the
    invariants (Woodbury's identity). That needs no inverse of a matrix that is singular where invariants depend on one
    another or are preserved anyway, and nothing that the projection takes away comes back by rounding.

    Args:
        erased: C_1 as rows, `(erased, dim)`.
        space: P, `(dim, dim)`.
        invariant: C_2 as rows, `(invariants, dim)`.
        regularisation: s > 0.
        leniency: l: above 0 the invariants are kept the less exactly the larger it is.

    Returns:
        `(erased, dim)`.
    """
    bound = invariant @ space
    ridge = regularisation * torch.eye(len(space), dtype=space.dtype)
    if leniency:
        ridge = ridge + bound.T @ bound / leniency
    else:
        _, reach, directions = torch.linalg.svd(bound, full_matrices=False)
        directions = directions[reach > 1e-8 * invariant.norm()]
        space = space - directions.T @ directions
    inside = erased @ space
    return solved(ridge + inside.T @ inside, inside.T).T @ space


def centres(points: Tensor, count: int, rounds: int = 100) -> Tensor:
    """Centres of clusters by k-means, `(clusters, dim)`; the points themselves where there are no more of them.

    The first centre is the first point, each further one the point that is farthest from those before, so that the
    same points have the same centres.

    Args:
        points: `(points, dim)`.
        count: How many clusters.
        rounds: Most rounds of assigning points and moving centres.
    """
    if len(points) <= count:
        return points
    chosen = points[:1]
    while len(chosen) < count:
        farthest = torch.cdist(points, chosen).amin(1).argmax()
        chosen = torch.cat([chosen, points[farthest][None]])
    for _ in range(rounds):
        nearest = torch.cdist(points, chosen).argmin(1)
        groups = [points[nearest == index] for index in range(count)]
        moved = torch.stack([group.mean(0) if len(group) else old for group, old in zip(groups, chosen, strict=True)])
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen
