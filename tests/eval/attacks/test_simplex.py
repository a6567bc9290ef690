"""Projection onto the simplex against an independent reference; the straight-through gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch.nn import functional as F

from erasure.eval.attacks.simplex import draw, project, straight_through, uniform


def reference(row: np.ndarray) -> np.ndarray:
    """By root finding: the shift at which the positive parts sum to 1."""
    shift = brentq(lambda tau: np.maximum(row - tau, 0).sum() - 1, row.min() - 1, row.max(), xtol=1e-15)
    return np.maximum(row - shift, 0)


@pytest.mark.parametrize("size", [1, 2, 7, 986])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_projection_is_the_nearest_point(size: int, scale: float) -> None:
    points = scale * torch.randn(4, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    found = project(points)
    expected = np.stack([reference(row) for row in points.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (found >= 0).all()
    assert (found <= 1).all()
    torch.testing.assert_close(project(found), found, rtol=0, atol=1e-12)


def test_no_random_point_of_the_simplex_is_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 5, generator=generator)
    others = torch.rand(2000, 5, generator=generator).log().neg()
    others /= others.sum(-1, keepdim=True)
    assert (points - project(points)).norm() <= (points - others).norm(dim=-1).min()


def test_a_large_vocabulary_in_single_precision() -> None:
    points = uniform(3, 49406) + 0.01 * torch.randn(3, 49406, generator=torch.Generator().manual_seed(0)).sign()
    found = project(points)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(project(uniform(2, 49406)), uniform(2, 49406))


def test_ties_and_corners() -> None:
    assert project(torch.tensor([[5.0, 5.0, -1.0]])).tolist() == [[0.5, 0.5, 0.0]]
    assert project(torch.tensor([[9.0, 0.0, 0.0]])).tolist() == [[1.0, 0.0, 0.0]]


def test_draws_follow_the_points_and_the_seed() -> None:
    points = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75]])
    drawn = draw(points, 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 2)
    assert (drawn[:, 0] == 1).all()
    share = (drawn[:, 1] == 2).double().mean()
    assert abs(share - 0.75) < 0.03
    assert torch.equal(drawn, draw(points, 4000, torch.Generator().manual_seed(0)))


def test_the_gradient_goes_straight_through_and_is_clamped() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 4, generator=generator)
    target = torch.randn(3, 2, 4, generator=generator)
    points = torch.softmax(torch.randn(2, 6, generator=generator), -1)
    drawn = draw(points, 3, generator)
    one_hot = F.one_hot(drawn, 6).float().requires_grad_()
    loss = 0.3 * (one_hot @ table - target).square().sum()
    (expected,) = torch.autograd.grad(loss, one_hot)
    assert (expected.abs() > 1).any()
    assert (expected.abs() < 1).any()
    vectors = table[drawn].requires_grad_()
    (slope,) = torch.autograd.grad(0.3 * (vectors - target).square().sum(), vectors)
    torch.testing.assert_close(straight_through(slope, table), expected.clamp(-1, 1).sum(0))
