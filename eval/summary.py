"""Summaries of measurements for an erasure's config: a few figures by name, which its card and `erasure info` show."""

from __future__ import annotations

from collections.abc import Mapping

from erasure.eval.results import Results
from erasure.eval.rows import Record, is_control, is_figure
from erasure.eval.sizes import SIZES

VARIANTS = {"before": " before", "after": ""}
"""Endings of the names of figures, by variant."""
STAMPS = ("size", "date", "judge", "clip", "seed")


def summary(results: Results) -> Record:
    """Make the figures of an evaluation or attack for an erasure's config.

    Every key begins with the suite. A metric with an interval is `[value, low, high]`, one without is a number; those
    of the stock model have `before` in their names. What could not be measured is left out; where single images could
    not, the worst case stands beside.
    """
    figures: Record = {}
    stamps: Record = {"size": results.size, "date": results.date}
    for metric in results.metrics:
        variant = metric.get("variant", "after")
        stamps |= {key: value for key in ("judge", "clip", "seed") if (value := metric["recipe"].get(key)) is not None}
        if metric["value"] is None or variant not in VARIANTS or not is_figure(metric):
            continue
        bounds = [metric["low"], metric["high"]]
        value = metric["value"] if None in bounds else [metric["value"], *bounds]
        name = f"{results.suite}: {metric['name']}{VARIANTS[variant]}"
        figures[name] = value
        if metric.get("missing") and isinstance(worst := metric.get("worst"), Mapping):
            figures[f"{name}, at worst"] = worst["value"]
    return figures | {f"{results.suite}: {key}": stamps[key] for key in STAMPS if stamps.get(key) is not None}


def is_valid(results: Results) -> bool:
    """Whether every control holds, without which the figures are not valid.

    That of a detector's flags does not count: where it fails, that detector has no figure, and the others stand.
    """
    controls = [metric for metric in results.metrics if is_control(metric)]
    return all(metric["holds"] for metric in controls if not metric["name"].startswith("control_flagged"))


def merged(known: Mapping[str, object], found: Record, suite: str) -> Record:
    """Replace the figures of one suite by new ones; those of other suites stay."""
    return {key: value for key, value in known.items() if not key.startswith(f"{suite}: ")} | found


def is_smaller(known: Mapping[str, object], results: Results) -> bool:
    """Whether the suite was already measured in a larger size, whose figures are kept."""
    before = known.get(f"{results.suite}: size")
    return before in SIZES and results.size in SIZES and SIZES.index(results.size) < SIZES.index(str(before))
