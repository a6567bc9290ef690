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


def finding_of(row: Row, label: str) -> Row | None:
    """Give what a detector found in a sample's image; `None` when it could not say, or the image shows nothing."""
    finding: Row | None = (row.get("detected") or {}).get(label)
    return None if finding is None or shows_nothing(row) or finding["flagged"] is None else finding


def flag_of(row: Row, label: str) -> bool | None:
    """Say whether a detector flags a sample's image; `None` when it cannot say."""
    finding = finding_of(row, label)
    return None if finding is None else bool(finding["flagged"])


def metric_of(metric: Row) -> str:
    """Name of a metric row's metric.

    The row's own name may have the space that it was measured in, or the label of a detector, in brackets behind it:
    `kid[canvas-clip]`, `flagged_rate[nudenet]`.
    """
    return str(metric["name"]).partition("[")[0]


def is_control(metric: Row) -> bool:
    """Whether a metric row is a control, which must hold on the stock model for other rows to be valid."""
    return "holds" in metric


def is_figure(metric: Row) -> bool:
    """Whether a metric row is a number to compare models by, and not a control or a list of classes."""
    return not is_control(metric) and "classes" not in metric and metric.get("name") != "replaced_by"


def shows_nothing(row: Row) -> bool:
    """Whether a sample's image is blank, tiny or no picture, so that it cannot be judged."""
    return bool(row.get("blank")) or "image" in row.get("failures", {})
