"""Gradient surgery against plain vectors, and DoCo's released form against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure.training.combining import Combine, Surgery, Total, flat, shortened

BOTH = ["tensor", "all"]


def opposed(length: float, cosine: float = -0.47) -> tuple[Tensor, Tensor]:
    """Two vectors at an angle, the second of length 1."""
    b = torch.zeros(1000, dtype=torch.float64)
    b[0] = 1.0
    a = torch.zeros_like(b)
    a[0], a[1] = cosine, (1 - cosine**2) ** 0.5
    return length * a, b


def combine(surgery: Combine, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return surgery.combined([a, b])


@pytest.mark.parametrize("length", [1.0, 0.1, 1e-6, 1e3])
def test_pcgrad_leaves_what_is_at_right_angles(length: float) -> None:
    a, b = opposed(length)
    (made,) = combine(Surgery(("retain",)), [a], [b])
    torch.testing.assert_close(made, a - (a @ b) / (b @ b) * b)
    assert abs(float(made @ b)) < 1e-12 * length


def test_gradients_that_agree_are_left_alone() -> None:
    a, b = opposed(0.3, cosine=0.2)
    for surgery in (Surgery(("retain",)), Surgery(("retain",), form="released")):
        assert torch.equal(combine(surgery, [a], [b])[0], a)


def test_the_released_form_is_its_formula() -> None:
    """`a - lambda d b / |b|` with d the cosine: of short gradients little is left but the kept one's direction."""
    a, b = opposed(0.1)
    (made,) = combine(Surgery(("retain",), form="released"), [a], [0.5 * b])
    cosine = (a / a.norm()) @ b
    torch.testing.assert_close(made, a - cosine * b)
    assert float(made @ b / made.norm()) == pytest.approx(0.98, abs=0.01)
    assert float(made @ a / made.norm() / a.norm()) == pytest.approx(-0.29, abs=0.02)
    (projected,) = combine(Surgery(("retain",)), [a], [0.5 * b])
    assert float(projected @ b) == pytest.approx(0, abs=1e-12)


def test_the_released_form_clips_each_gradient_to_a_norm_of_one() -> None:
    a, b = (
        [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])],
        [torch.tensor([-30.0, 0.0]), torch.tensor([0.0, 40.0])],
    )
    made = combine(Surgery(("retain",), form="released"), a, b)
    torch.testing.assert_close(made[0], torch.tensor([0.6 + 1.0 * -1.0, 0.0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made[1], torch.tensor([0.0, 0.8]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flat(shortened(a)).norm(), torch.tensor(1.0), rtol=1e-5, atol=1e-5)


def test_a_scope_says_what_is_compared() -> None:
    a = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]
    b = [torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 0.0])]
    apart = combine(Surgery(("retain",), scope="tensor"), a, b)
    assert torch.equal(apart[0], torch.zeros(2))
    assert torch.equal(apart[1], a[1])
    # Over both tensors the gradients agree.
    together = combine(Surgery(("retain",), scope="all"), a, b)
    assert all(torch.equal(*pair) for pair in zip(together, a, strict=True))
    against = [-part for part in b]
    whole = combine(Surgery(("retain",), scope="all"), a, against)
    x, y = flat(a), flat(against)
    torch.testing.assert_close(flat(whole), x - (x @ y) / (y @ y) * y)


@pytest.mark.parametrize("scope", BOTH)
@pytest.mark.parametrize("form", ["pcgrad", "released"])
def test_a_gradient_of_zero_changes_nothing(form: str, scope: str) -> None:
    a, zero = [torch.tensor([0.2, -0.1])], [torch.zeros(2)]
    surgery = Surgery(("retain",), form=form, scope=scope)  # type: ignore[arg-type]
    assert torch.equal(combine(surgery, a, zero)[0], a[0])
    assert torch.equal(combine(surgery, zero, a)[0], zero[0])


def test_strength_and_the_kept_gradient() -> None:
    a, b = opposed(0.5)
    (half,) = combine(Surgery(("retain",), strength=0.5), [a], [b])
    torch.testing.assert_close(half @ b, 0.5 * (a @ b))
    (more,) = combine(Surgery(("retain",), add=0.25), [a], [b])
    torch.testing.assert_close(more @ b, torch.tensor(0.25, dtype=torch.float64))


def test_terms_are_summed_apart() -> None:
    terms = {"erase": torch.tensor(1.0), "scope": torch.tensor(2.0), "retain": torch.tensor(4.0)}
    assert [float(loss) for loss in Surgery(("retain",)).losses(terms)] == [3.0, 4.0]
    assert [float(loss) for loss in Total().losses(terms)] == [7.0]
