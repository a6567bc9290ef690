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


def judged_of(row: Row) -> Row | None:
    """Give the judge's answer on a sample's image; `None` when it failed or the image shows nothing."""
    return None if shows_nothing(row) else row.get("judged")


def is_control(metric: Row) -> bool:
    """Whether a metric row is a control: it says of the stock model whether the other rows mean anything."""
    return "holds" in metric


def is_figure(metric: Row) -> bool:
    """Whether a metric row is a number to compare models by: no control, and not the list of what was seen instead."""
    return not is_control(metric) and "classes" not in metric and metric.get("name") != "replaced_by"


def shows_nothing(row: Row) -> bool:
    """Whether a sample's image is blank, tiny or no picture, so that nothing said of it would mean anything."""
    return bool(row.get("blank")) or "image" in row.get("failures", {})
