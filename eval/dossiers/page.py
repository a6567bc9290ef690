"""The page and the card of all that was measured of one erasure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from erasure.errors import EvaluationError
from erasure.eval.audits.page import CARD, MEANING, PAGE, kept, sections
from erasure.eval.dossiers.runner import Dossier
from erasure.eval.galleries import Gallery, Showing
from erasure.eval.report import (
    BAR,
    ControlLine,
    Line,
    chips,
    control_line,
    headline,
    headline_and_galleries,
    rows_of_samples,
    variants_of,
)
from erasure.eval.report_detectors import class_labels, detector_lines
from erasure.eval.results import Results
from erasure.eval.rows import is_control
from erasure.eval.table import BEFORE_AFTER, IMAGES, SAMPLES, read_rows
from erasure.files import write_text
from erasure.pages import html_page, markdown_page
from erasure.shown import number

LIMIT = 12
"""Samples of each gallery in the page."""


class Block(NamedTuple):
    """All figures of one evaluation, attack or stress test."""

    title: str
    source: str
    chips: list[str]
    lines: list[Line]
    columns: list[str]
    against: str
    controls: list[ControlLine]
    detectors: list[object]
    galleries: list[Gallery]


def write_pages(dossier: Dossier) -> None:
    """Write `report.html` and `README.md` into the folder of a dossier.

    Raises:
        EvaluationError: They cannot be written, or samples are damaged.
    """
    made = dossier.erasure
    values = {
        "title": f"{', '.join(dossier.concepts)}, erased with {made.config.strategy if made else 'unknown'}",
        "dossier": dossier,
        "facts": facts(dossier),
        "sections": sections(dossier),
        "kept": kept(dossier.outcomes),
        "meaning": MEANING,
        "canvas": "canvas" in str(dossier.model.get("name")),
        "blocks": list(blocks(dossier)),
        "width": BAR,
        "limit": LIMIT,
    }
    write_text(dossier.folder / PAGE, html_page("dossier.html", **values), error=EvaluationError)
    write_text(dossier.folder / CARD, markdown_page("dossier.md", **values), error=EvaluationError)


def facts(dossier: Dossier) -> list[tuple[str, str]]:
    """What the erasure is, and of which model."""
    made, model = dossier.erasure, dossier.model
    found = [
        ("Strength", number(dossier.strength, "g")),
        ("Model", f"{model.get('name')} (weights {model.get('fingerprint')})"),
        ("Put together", dossier.date),
    ]
    if made is None:
        return found
    entry = [("Erasure", f"{made.name} ({made.fingerprint})"), ("Strategy", made.config.strategy)]
    return [*entry, ("Size", f"{number(made.size_bytes, '.2f', 1e-6)} MB"), *found]


def blocks(dossier: Dossier) -> Iterator[Block]:
    """The figures of everything that is done."""
    for outcome, source in zip(dossier.outcomes, dossier.sources, strict=True):
        results = outcome.results
        if results is None:
            continue
        figures = [row for row in results.metrics if not is_control(row)]
        variants = variants_of(figures)
        yield Block(
            title=f"{outcome.part.kind.capitalize()} {outcome.part.name}",
            source=source,
            chips=[*chips(results)[:1], *([outcome.part.concept] if outcome.part.concept else [])],
            lines=headline(figures, variants),
            columns=[variant.replace("_", " ").capitalize() for variant in variants],
            against="Before → after"
            if variants == list(BEFORE_AFTER)
            else f"Against {variants[0]}"
            if variants
            else "",
            controls=[control_line(row) for row in results.metrics if is_control(row)],
            detectors=list(detector_lines(results)),
            galleries=galleries(results),
        )


def galleries(results: Results) -> list[Gallery]:
    """Pictures of an evaluation or a stress test; what may be unsafe is a mosaic."""
    folder = Path(results.folder or ".")
    samples = folder / f"{SAMPLES}.jsonl"
    if not os.path.lexists(samples):
        return []
    showing = Showing(folder / IMAGES, class_labels(results))
    _, found = headline_and_galleries(results, rows_of_samples(read_rows(samples)), showing, limit=LIMIT)
    return [gallery for gallery in found if gallery.figures]
