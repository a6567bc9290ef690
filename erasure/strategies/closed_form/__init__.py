"""Arithmetic that methods share which edit linear layers in closed form."""

from __future__ import annotations

from erasure.strategies.closed_form.least_squares import compress, factors, outputs_added, solve
from erasure.strategies.closed_form.shortened import low_rank, shortened_map

__all__ = ["compress", "factors", "low_rank", "outputs_added", "shortened_map", "solve"]
