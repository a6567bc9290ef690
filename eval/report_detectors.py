"""What a report says of detectors: what they are, what they are worth, and how rates depend on their thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from erasure.eval.galleries import shade
from erasure.eval.results import Results
from erasure.eval.rows import Row
from erasure.shown import number

WIDTH, HEIGHT = 240, 110
"""Of a chart of rates by threshold, in pixels."""


class DetectorLine(NamedTuple):
    """One line of the table of detectors."""

    label: str
    about: str
    """Licence, weights and threshold."""
    sensitivity: str
    specificity: str
    remark: str


class Line(NamedTuple):
    """The rates of one variant by threshold, as a line; in pixels."""

    style: str
    points: str
    name: str


class Curve(NamedTuple):
    """Rates of a detector by threshold."""

    title: str
    lines: list[Line]
    mark: str
    """Place of the threshold that the numbers above are of, in pixels."""
    threshold: str


def flag_labels(results: Results) -> list[str]:
    """List the labels of detectors whose flags are counted."""
    return [entry["label"] for entry in results.detectors if entry.get("counts", "flags") == "flags"]


def class_labels(results: Results) -> frozenset[str]:
    """List the labels of detectors that only classify images."""
    return frozenset(entry["label"] for entry in results.detectors if entry.get("counts") == "classes")


def detector_lines(results: Results) -> list[DetectorLine]:
    """Describe each detector, with its sensitivity and specificity on the user's pictures."""
    lines = []
    for entry in results.detectors:
        recipe, measured = entry["recipe"], entry.get("controls")
        known = "known weights" if recipe.get("known") else "unknown weights"
        about = f"{recipe.get('detector')}, {recipe.get('licence')}, {known}, threshold {recipe.get('threshold')}"
        said = "not measured"
        sensitivity, specificity = (
            said if measured is None else share(measured[name]) for name in ("sensitivity", "specificity")
        )
        remark = str((entry.get("self_test") or {}).get("remark", ""))
        lines.append(DetectorLine(entry["label"], about, sensitivity, specificity, remark))
    return lines


def unmeasured(results: Results) -> list[str]:
    """List the labels of detectors without a measured sensitivity."""
    return [entry["label"] for entry in results.detectors if entry.get("controls") is None]


def share(measured: Mapping[str, object]) -> str:
    """Format a rate on the user's own pictures."""
    if measured["value"] is None:
        return f"not given: {measured.get('reason')}"
    value, low, high = (number(measured[key], ".1f", 100) for key in ("value", "low", "high"))
    missing = f", {number(measured['missing'], '')} missing" if measured.get("missing") else ""
    return f"{value} % ({low} to {high}), n = {number(measured['n'], '')}{missing}"


def curves(metrics: Sequence[Row]) -> list[Curve]:
    """Draw the rates by threshold of every metric row that has them."""
    found: dict[str, list[Row]] = {}
    for metric in metrics:
        if isinstance(metric.get("curve"), Mapping) and metric["curve"]:
            found.setdefault(str(metric["name"]), []).append(metric)
    made = []
    for name, sides in found.items():
        lines = []
        for index, metric in enumerate(sides):
            variant = str(metric.get("variant", "after"))
            lines.append(Line(shade(variant, index), _points(metric["curve"]), variant))
        detector = sides[0]["recipe"].get("detector")
        threshold = detector.get("threshold") if isinstance(detector, Mapping) else None
        place = _number(threshold)
        mark = "" if place is None else f"{WIDTH * place:.1f}"
        made.append(Curve(name, lines, mark, "" if place is None else number(place, "g")))
    return made


def _points(curve: Mapping[str, object]) -> str:
    """Convert thresholds and shares to points of a line; values that are no numbers are left out."""
    pairs = sorted(
        (x, y)
        for text, value in curve.items()
        if (x := _number(text)) is not None and (y := _number(value)) is not None
    )
    return " ".join(f"{WIDTH * x:.1f},{HEIGHT * (1 - y):.1f}" for x, y in pairs)


def _number(value: object) -> float | None:
    """Convert a value to a number in 0-1; `None` for anything else."""
    try:
        read = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return read if 0 <= read <= 1 else None
