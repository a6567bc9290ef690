"""What an edit of activations gave for a batch, so that the same batch need not be edited again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Edited(NamedTuple):
    """Edited activations, and their inputs, by which equal batches are recognised."""

    states: Tensor
    """What came in, `(batch, tokens, dim)`."""
    ids: Tensor | None
    opened_by_others: tuple[Tensor | None, ...]
    """For each term: gates that other text encoders have opened."""
    output: Tensor
    """What goes out."""
    opened: tuple[Tensor, ...]
    """For each term: gates that are open now, `(batch, concepts)`."""

    def is_of(self, states: Tensor, ids: Tensor | None, opened_by_others: tuple[Tensor | None, ...]) -> bool:
        """Whether the inputs are the same, so that the result can be used again."""
        return (
            _same(self.states, states)
            and _same(self.ids, ids)
            and all(_same(a, b) for a, b in zip(self.opened_by_others, opened_by_others, strict=True))
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
