"""Hooks have exactly the edits that they should have, at the same strengths."""

from __future__ import annotations

import pytest
import torch

from erasure.carriers.edits import LowRank
from erasure.carriers.terms import same_terms

EDIT = LowRank(torch.ones(1, 4), torch.ones(4, 1))
EQUAL = LowRank(torch.ones(1, 4), torch.ones(4, 1))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], [], True),
        ([(1.0, EDIT)], [(1.0, EDIT)], True),
        ([(1.0, EDIT, "name")], [(1.0, EDIT, "name")], True),
        ([(1.0, EDIT)], [(0.5, EDIT)], False),
        ([(1.0, EDIT)], [(1.0, EQUAL)], False),
        ([(1.0, EDIT, "name")], [(1.0, EDIT, "")], False),
        ([(1.0, EDIT)], [(1.0, EDIT, "")], False),
        ([(1.0, EDIT)], [], False),
        ([(1.0, EDIT), (0.5, EQUAL)], [(0.5, EQUAL), (1.0, EDIT)], False),
    ],
)
def test_terms_are_the_same_edits_in_force_alike(one: list, other: list, expected: bool) -> None:
    assert same_terms(one, other) == expected
