"""Smooth curves in the place of steps, for gradients."""

from __future__ import annotations

import pytest
import torch

from erasure.carriers.steps import smooth_step

INF = float("inf")


@pytest.mark.parametrize("score", [-INF, -1e30, -3.0, 0.0, 0.5, 3.0, 1e30])
@pytest.mark.parametrize("level", [-INF, -2.0, 0.5, INF])
def test_a_smooth_step_is_finite_with_its_gradients_wherever_the_level_is(score: float, level: float) -> None:
    scores = torch.tensor([score, 0.1], requires_grad=True)
    levels = torch.tensor(level, requires_grad=True)
    curve = smooth_step(scores, levels, 0.1)
    curve.sum().backward()
    assert curve.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert levels.grad is not None
    assert levels.grad.isfinite().all()
    assert ((curve.detach() >= 0.5) == (scores.detach() >= level)).all()


def test_the_slope_tells_the_way_from_however_far() -> None:
    scores = torch.tensor([-400.0, -4.0, 4.0], requires_grad=True)
    smooth_step(scores, torch.tensor(0.0), 0.1).sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad * scores.detach().abs(), torch.full((3,), 0.19661193))
