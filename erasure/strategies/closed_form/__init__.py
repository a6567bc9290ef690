"""Arithmetic that is shared by methods that edit linear layers in closed form."""

from __future__ import annotations

from erasure.strategies.closed_form.least_squares import compress, factors, outputs_added, solve, solved
from erasure.strategies.closed_form.prompts import bare_or_phrased, random_prompts
from erasure.strategies.closed_form.shortened import low_rank, shortened_map

__all__ = [
    "bare_or_phrased", "compress", "factors", "low_rank", "outputs_added", "random_prompts", "shortened_map", "solve",
    "solved",
]  # fmt: skip
