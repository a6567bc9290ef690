"""What methods share that edit linear layers in closed form."""

from __future__ import annotations

from erasure.strategies.closed_form.least_squares import compress, factors, outputs_added, solve
from erasure.strategies.closed_form.pairs import paired_at_the_end

__all__ = ["compress", "factors", "outputs_added", "paired_at_the_end", "solve"]
