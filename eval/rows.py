"""Rows of tables and other plain data, as JSON holds them; `erasure.eval.schemas` says what is in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]
"""Plain data by name, still being put together."""
Row = Mapping[str, Any]
"""Plain data by name, to be read."""
Rows = Mapping[str, Sequence[Row]]
"""Rows of the samples, by variant."""
