"""`report.html`: one self-contained file with the headline table and paired images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from erasure.errors import EvaluationError
from erasure.eval.attacks import ATTACKS
from erasure.eval.comparison import label
from erasure.eval.cost import SHARES
from erasure.eval.detectors.judging import CLEAR, FLAGGED
from erasure.eval.galleries import LIMIT, Drawn, Gallery, Showing, right, shade, transition_galleries, veiled
from erasure.eval.metrics import facts_of
from erasure.eval.report_detectors import (
    HEIGHT,
    WIDTH,
    class_labels,
    curves,
    detector_lines,
    flag_labels,
    unmeasured,
)
from erasure.eval.results import Results
from erasure.eval.rows import Record, Row, is_control
from erasure.eval.table import BEFORE_AFTER, IMAGES, SAMPLES, read_rows
from erasure.files import write_text
from erasure.pages import html_page
from erasure.shown import number

FILE, REVEALED = "report.html", "revealed.html"
BAR = 180
"""Width of a bar at 100 %, in pixels."""


class Cell(NamedTuple):
    """A metric in one variant; a value that could not be had is `None`, and the detail says why."""

    value: str | None
    detail: str


class Bar(NamedTuple):
    """A value as a bar, and its interval as a line across; in pixels."""

    style: str
    y: int
    value: str
    low: str
    high: str


class Chart(NamedTuple):
    """The bars of all variants of a metric."""

    variants: list[str]
    bars: list[Bar]


class Line(NamedTuple):
    """One line of the headline table."""

    title: str
    about: str
    concept: str | None
    cells: list[Cell | None]
    chart: Chart | None
    tests: list[tuple[str, str]]


class ControlLine(NamedTuple):
    """One line of the table of controls."""

    title: str
    about: str
    concept: str
    cell: Cell
    needed: str
    holds: bool


def write_report(folder: str | Path, path: str | Path | None = None, *, title: str | None = None) -> Path:
    """Write the report of an evaluation.

    Args:
        folder: What `evaluate` wrote: `results.json`, `samples.jsonl`, `images/`.
        path: Where to; `report.html` in the folder by default.
        title: Headline; made from erasures and concepts by default.

    Returns:
        The file.

    Raises:
        EvaluationError: The folder holds no results, or an image of a sample lies elsewhere.
    """
    folder = Path(folder)
    results, drawn = _measured(folder)
    path = Path(path) if path is not None else folder / FILE
    beside = path.absolute().parent == folder.absolute()
    write_text(path, render(results, drawn, folder / IMAGES, title, beside=beside), error=EvaluationError)
    return path


def write_revealed(folder: str | Path) -> Path | None:
    """Write the samples whose pictures the report hides, and those alone, into `revealed.html` beside it.

    Whoever checks a detector must see what it flags. The report itself never holds these pictures.

    Args:
        folder: What `evaluate` wrote.

    Returns:
        The file; `None` where no picture is hidden. A page of an earlier run is gone then.

    Raises:
        EvaluationError: See `write_report`.
    """
    folder = Path(folder)
    results, drawn = _measured(folder)
    telling, path = class_labels(results), folder / REVEALED
    hidden = [sides for sides in drawn if veiled(sides, telling)]
    if not hidden:
        path.unlink(missing_ok=True)
        return None
    title = f"Pictures that may be unsafe, of {results.suite}"
    write_text(path, render(results, hidden, folder / IMAGES, title, beside=True, reveal=True), error=EvaluationError)
    return path


def _measured(folder: Path) -> tuple[Results, list[Drawn]]:
    """Read a folder's results, and the rows of its samples."""
    results, samples = Results.load(folder), folder / f"{SAMPLES}.jsonl"
    return results, rows_of_samples(read_rows(samples) if os.path.lexists(samples) else [])


def rows_of_samples(rows: Sequence[Row]) -> list[Drawn]:
    """Group rows by sample and variant, in the order of the file."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["sample_id"], {})[row["variant"]] = row
    return list(found.values())


def render(
    results: Results, drawn: Sequence[Drawn], images: Path, title: str | None = None, *, beside: bool = False,
    reveal: bool = False,
) -> str:  # fmt: skip
    """Render the page as a string.

    Args:
        results: What was measured.
        drawn: Rows of the samples.
        images: Folder of the images of all variants.
        title: Headline; made from erasures and concepts when left out.
        beside: Whether the page will lie beside that folder, so that it can name the files of images that are hidden.
        reveal: Hide nothing.
    """
    showing = Showing(images, class_labels(results), beside, reveal)
    title, galleries = headline_and_galleries(results, drawn, showing, title)
    controls = [metric for metric in results.metrics if is_control(metric)]
    metrics = [metric for metric in results.metrics if not is_control(metric)]
    variants = variants_of(metrics)
    return html_page(
        "report.html",
        title=title,
        chips=chips(results),
        canvas=results.suite.startswith("canvas") or "canvas" in str(results.model.get("name")),
        columns=[variant.replace("_", " ").capitalize() for variant in variants],
        against="Before → after" if variants == list(BEFORE_AFTER) else f"Against {variants[0]}",
        lines=headline(metrics, variants),
        controls=[control_line(metric) for metric in controls],
        width=BAR,
        detectors=detector_lines(results),
        unmeasured=unmeasured(results),
        curves=curves(metrics),
        curve_size=(WIDTH, HEIGHT),
        galleries=[gallery for gallery in galleries if gallery.figures],
        limit=LIMIT,
        costs=costs(results),
        recipes=recipes(results),
    )


def headline_and_galleries(
    results: Results, drawn: Sequence[Drawn], showing: Showing, title: str | None = None, limit: int = LIMIT
) -> tuple[str, list[Gallery]]:
    """Make headline and galleries; images that may be unsafe are left out unless revealed (`galleries.veiled`).

    Args:
        results: What was measured.
        drawn: Rows of the samples.
        showing: Where images are.
        title: Headline; made from erasures and concepts when left out.
        limit: Samples shown per gallery.
    """
    if any({"before", "after"}.isdisjoint(sides) for sides in drawn):
        about = "One sample in every way, from the same noise."
        return title or f"Suite {results.suite}", [Gallery.of("Images", about, drawn, showing, limit=limit)]
    concept = next((row["concept"] for row in results.metrics if row["concept"]), None)
    title = title or (f"{concept}, erased with {label(results)}" if results.erasures else "The stock model")
    whole = [sides for sides in drawn if "before" in sides]
    target = [sides for sides in whole if sides["before"]["role"] == "target"]
    kept = [sides for sides in whole if sides["before"]["role"] != "target"]
    lost = [s for s in kept if right(s["before"]) and "after" in s and right(s["after"]) is False]
    lost_about = "Retained prompts that the judge recognised before, and no longer."
    galleries = [g for name in flag_labels(results)[:1] for g in transition_galleries(whole, name, showing, limit)]
    if not galleries or not flags_alone(whole):
        galleries += [
            Gallery.of(
                "Target prompts", "What must be gone. Same noise above and below.", target, showing, limit=limit
            ),
            Gallery.of(
                "Retained prompts", "What must survive. Same noise above and below.", kept, showing, limit=limit
            ),
            Gallery.of("Lost", lost_about, lost, showing, folded=True, limit=limit),
        ]
    return title, galleries


def flags_alone(drawn: Sequence[Drawn]) -> bool:
    """Whether the judge's answers add nothing to the galleries of a detector's flags."""
    judged = [row["judged"] for sides in drawn for row in sides.values() if row.get("judged") is not None]
    return all(answer["object"] in (FLAGGED, CLEAR, None) for answer in judged)


def chips(results: Results) -> list[str]:
    """List in a few words what was measured."""
    found = [f"suite {results.suite} / {results.size}", f"model {results.model.get('name')}"]
    if results.suite in ATTACKS:
        found[0] = f"attack {results.suite} / {results.size}"
        found.append(f"the attacker needs: {ATTACKS.facts(results.suite).attributes['access']}")
    return found + [
        f"{e['name']} ({e.get('strategy', 'unknown')}, strength {number(e.get('strength', 1), 'g')})"
        for e in results.erasures
    ]


def variants_of(metrics: Sequence[Row]) -> list[str]:
    """List the columns of the headline table."""
    variants = list(dict.fromkeys(str(metric.get("variant", "after")) for metric in metrics))
    return list(BEFORE_AFTER) if set(variants) <= set(BEFORE_AFTER) else variants


def headline(metrics: Sequence[Row], variants: Sequence[str]) -> list[Line]:
    """Make the rows of the headline table: every metric in every variant, with intervals as bars."""
    rows: dict[tuple[str, str | None], dict[str, Row]] = {}
    for metric in metrics:
        rows.setdefault((metric["name"], metric["concept"]), {})[metric.get("variant", "after")] = metric
    several = len({concept for _, concept in rows}) > 1
    lines = []
    for (name, concept), sides in rows.items():
        facts = facts_of(next(iter(sides.values()))).attributes
        present = {variant: sides[variant] for variant in variants if variant in sides}
        lines.append(
            Line(
                title=_title(name, str(facts["title"])),
                about=f"{name}: {facts['about']}",
                concept=str(concept) if several else None,
                cells=[value_cell(sides.get(variant)) for variant in variants],
                chart=chart(present) if facts["unit"] == "%" else None,
                tests=[tested for side in variants[1:] if (tested := test_cell(sides.get(side)))],
            )
        )
    return lines


def _title(name: str, title: str) -> str:
    """Give a metric's title, with its feature space in brackets."""
    _, bracket, space = name.partition("[")
    return f"{title} [{space}" if bracket and title != name else title


def value_cell(metric: Row | None) -> Cell | None:
    """Format a value with its interval and sample size."""
    if metric is None:
        return None
    if metric["value"] is None:
        return Cell(None, str(metric.get("reason", "")))

    is_share = facts_of(metric).attributes["unit"] == "%"

    def show(value: object) -> str:
        return f"{number(value, '.1f', 100)} %" if is_share else number(value)

    detail = f"n = {number(metric['n'], '')}"
    classes = metric.get("classes")
    if isinstance(classes, Mapping) and classes:
        detail += f": {', '.join(f'{name} {show(share)}' for name, share in classes.items())}"
    groups, pairs = metric.get("groups"), metric.get("pairs")
    if isinstance(groups, Mapping):
        detail += f"; groups: {', '.join(f'{name} {show(share)}' for name, share in groups.items())}"
    if isinstance(pairs, Mapping):
        counted = [f"{name} {number(count, '')}" for name, count in pairs.items()]
        detail += f": {', '.join(counted)}"
    if metric["low"] is not None:
        detail = f"{show(metric['low'])} to {show(metric['high'])}, {detail}"
    if metric.get("missing"):
        detail += f", {number(metric['missing'], '')} missing"
        if isinstance(worst := metric.get("worst"), Mapping):
            detail += f", at worst {show(worst.get('value'))}"
    if verdict := metric.get("verdict"):
        detail = f"{verdict}; {detail}"
    return Cell(show(metric["value"]), detail)


def control_line(metric: Row) -> ControlLine:
    """Make the line of a control: its share, and whether it holds."""
    facts, cell = facts_of(metric).attributes, value_cell(metric) or Cell(None, "")
    limit = {word: metric["recipe"].get(word) for word in ("at_least", "at_most")}
    needed = "".join(
        f"{word.replace('_', ' ')} {number(v, '.0f', 100)} %" for word, v in limit.items() if v is not None
    )
    return ControlLine(
        facts["title"], facts["about"], str(metric["concept"] or ""), cell, needed, bool(metric["holds"])
    )


def chart(sides: Mapping[str, Row]) -> Chart:
    """Draw a bar for each variant with a value, with the interval as a line."""
    bars = []
    for index, (side, metric) in enumerate(sides.items()):
        value, low, high = (
            metric["value"] if metric[key] is None else metric[key] for key in ("value", "low", "high")
        )
        if value is not None:
            bars.append(Bar(shade(side, index), 6 + 16 * index, _pixels(value), _pixels(low), _pixels(high)))
    return Chart(list(sides), bars)


def _pixels(share: object) -> str:
    return f"{BAR * min(max(share, 0), 1):.1f}" if isinstance(share, int | float) else "0"


def test_cell(metric: Row | None) -> tuple[str, str] | None:
    """Format McNemar's p and the transitions, or the paired change."""
    if metric is None:
        return None
    if "mcnemar_p" in metric:
        p, table = metric["mcnemar_p"], metric.get("transitions", {})
        told = "p < 0.0001" if isinstance(p, float) and p < 1e-4 else f"p = {number(p, '.4f')}"
        if not isinstance(table, Mapping):
            return f"McNemar {told}", str(table)
        pairs = {"yes → yes": "both", "yes → no": "before_only", "no → yes": "after_only", "no → no": "neither"}
        present = (f"{pair} {number(table[key], '')}" for pair, key in pairs.items() if key in table)
        return f"McNemar {told}", ", ".join(present)
    if isinstance(change := metric.get("change"), Mapping):
        value, low, high = (number(change.get(key), "+.4f") for key in ("value", "low", "high"))
        return value, f"{low} to {high}"
    return None


def costs(results: Results) -> list[tuple[str, str]]:
    """List the costs: seconds, memory and sizes."""
    cost = results.cost
    per_image = cost.get("seconds_per_image") or {}
    rows = [
        ("Evaluation", _seconds(cost.get("seconds"))),
        *(
            (f"Of that, in {what}", f"{number(cost[key], '.0f', 100)} %")
            for key, what in SHARES.items()
            if cost.get(key)
        ),
        ("Peak memory", f"{number(cost.get('peak_memory_mb', 0), '.0f')} MB"),
    ]
    rows += [(f"Per image, {variant}", _seconds(value)) for variant, value in per_image.items()]
    if results.erasures:
        rows.append(("Making the erasures", _seconds(cost.get("erase_seconds"))))
        rows.append(("Size of the erasures", f"{number(cost.get('artifact_bytes', 0), '.2f', 1e-6)} MB"))
    if results.date:
        rows.append(("Finished", results.date))
    rows.append(("Machine", f"{cost.get('device')}, {cost.get('threads')} threads of {cost.get('cpus')} cores"))
    return rows


def _seconds(value: float | None) -> str:
    if value is None:
        return "from the cache"
    minutes = isinstance(value, int | float) and value >= 100
    return f"{number(value, '.1f', 1 / 60)} min" if minutes else f"{number(value, '.2f')} s"


def recipes(results: Results) -> list[tuple[str, Record]]:
    """List how every number was computed, as titles and plain data."""
    blocks = [
        (
            f"{metric['name']} ({metric.get('variant', 'after')}, {metric['concept']})",
            {key: value for key, value in metric.items() if key not in ("name", "concept", "variant")},
        )
        for metric in results.metrics
    ]
    whole = {"model": results.model, "erasures": results.erasures, "cost": results.cost, "versions": results.versions}
    return [*blocks, ("Model, erasures, cost, versions", whole)]
