"""Null-space arithmetic of SPEED (arXiv 2503.07392): layers change only in directions that no preserved input uses."""

from __future__ import annotations

import torch
from torch import Tensor

from erasure.strategies.closed_form.least_squares import solved


def null_space(covariance: Tensor, threshold: float) -> Tensor:
    """Compute the projection onto the directions in which preserved features have almost no energy, `(dim, dim)`.

    Args:
        covariance: Mean of the outer products of the preserved features, `(dim, dim)`.
        threshold: Eigenvalue below which a direction belongs to the null space.
    """
    values, vectors = torch.linalg.eigh(covariance)
    free = vectors[:, values < threshold]
    return free @ free.T


def constrained(erased: Tensor, space: Tensor, invariant: Tensor, regularisation: float, leniency: float) -> Tensor:
    """Compute the right factor of SPEED's closed form, which keeps invariants exactly inside of a null space.

    The change `D P` of a layer that minimises `|(W + D P) C_1 - W C_*|^2 + s |D P|^2` under `D P C_2 = 0` is `W (C_* -
    C_1) C_1^T P Q M` with `M = (C_1 C_1^T P + s I)^-1` and `Q = I - M C_2 (C_2^T P M C_2 + l I)^-1 C_2^T P`. This
    function gives `C_1^T P Q M`. With l = 0 it is computed as a ridge regression in the part of the null space that is
    orthogonal to the invariants, and otherwise as a ridge regression with weights of `1 / l` on the invariants
    (Woodbury's identity). Neither form inverts a matrix that is singular when invariants are linearly dependent or are
    preserved already, and rounding cannot bring back what the projection removes.

    Args:
        erased: C_1 as rows, `(erased, dim)`.
        space: P, `(dim, dim)`.
        invariant: C_2 as rows, `(invariants, dim)`.
        regularisation: s > 0.
        leniency: l >= 0: 0 keeps the invariants exactly, larger values less exactly.

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
    """Cluster points by k-means and give the centres, `(clusters, dim)`; all points when there are at most `count`.

    The first centre is the first point, and each following one is the point farthest from the centres before it, so
    the result is the same for the same points.

    Args:
        points: Points to cluster, `(points, dim)`.
        count: Number of clusters.
        rounds: Largest number of rounds of assigning points and moving centres.
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
