"""`erasure compare`: results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from erasure.cli.arguments import UsageError, parse
from erasure.cli.formats import as_csv, as_latex
from erasure.cli.page import Table, page_of
from erasure.cli.terminal import Terminal, format_metric, json_text
from erasure.shown import number

if TYPE_CHECKING:
    from erasure.eval.comparison import Comparison
    from erasure.interop.protocols import Settings

GAP = 3
"""Columns of the terminal between two columns of a table."""


@dataclass(kw_only=True)
class CompareOptions:
    """Show results side by side.

    Results of different recipes are refused, because their numbers cannot be compared.
    """

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files `results.json`, or the folders that hold them."""
    label: tuple[str, ...] = ()
    """Name of each result; that of its folder when left out. Results with the same label are of one method on
    different concepts, and a mean over them is shown."""
    format: Literal["table", "csv", "latex", "json", "html"] = "table"
    """`table` for people; `csv` with a line for every number; `latex` for the package booktabs; `json`; `html`."""
    out: Path | None = None
    """Write to this file what is printed otherwise; an HTML page where the format is `table`."""
    json: bool = False
    """Print JSON; the same as --format json."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(CompareOptions, "compare", argv)
    chosen = "json" if options.json else options.format
    terminal.json_only = chosen != "table"
    if not options.results:
        raise UsageError("nothing to compare: erasure compare FOLDER FOLDER ...")
    if options.label and len(options.label) != len(options.results):
        raise UsageError(
            f"{len(options.label)} --label for {len(options.results)} results: give one for each, or none"
        )
    from erasure.eval import compare

    comparison = compare(options.results, options.label)
    present(comparison, chosen, terminal, printed=chosen == "table" or options.out is None)
    for method in comparison.repeated():
        terminal.say(
            f"No mean over concepts for {method}: one of them was measured more than once. --label tells runs apart."
        )
    if options.out is not None and terminal.speaks:
        from erasure.files import write_text

        write_text(options.out, written(comparison, "html" if chosen == "table" else chosen), error=UsageError)
        terminal.say(f"Wrote {options.out}")


def present(comparison: Comparison, kind: str, terminal: Terminal, *, printed: bool = True) -> None:
    """Print a comparison, and why values are missing.

    Args:
        comparison: What to print.
        kind: `table`, or what `written` takes.
        terminal: Where to.
        printed: Whether the comparison itself is printed, and not only what is missing.
    """
    for part in comparison.suites() if kind == "table" and printed else []:
        columns, rows = layout(part, terminal.width)
        terminal.table(columns, rows, title=about(part))
    if kind != "table" and printed:
        terminal.whole(written(comparison, kind))
    terminal.say(*unmeasured(comparison))


def written(comparison: Comparison, kind: str, title: str = "Results side by side") -> str:
    """A comparison as JSON, CSV, LaTeX or a page with a title."""
    if kind == "json":
        return json_text(comparison.to_dict() | {"means": comparison.means()})
    if kind == "csv":
        return as_csv(comparison)
    tables = [Table(about(part), *layout(part)) for part in comparison.suites()]
    return as_latex(tables) if kind == "latex" else page_of(title, tables)


def about(comparison: Comparison) -> str:
    """Describe the table of one suite in a sentence."""
    kinds = sorted({f"{row['suite']} ({row['size']})" for row in comparison.rows})
    concepts = {row["concept"] for row in comparison.rows} - {None}
    of = f", concept {concepts.pop()}" if len(concepts) == 1 else ""
    return f"Suite {', '.join(kinds)}{of}. Values with 95 % intervals; what could not be measured is -."


def unmeasured(comparison: Comparison) -> list[str]:
    """Why values are missing, a line for each reason."""
    why: dict[str, list[str]] = {}
    for row in comparison.rows:
        for name, reason in row["missing"].items():
            if name not in row["cells"]:
                why.setdefault(reason, []).append(f"{name} of {row['label']}")
    return [f"{', '.join(which[:3])}{' and others' * (len(which) > 3)}: {reason}" for reason, which in why.items()]


def layout(comparison: Comparison, width: int | None = None) -> tuple[list[str], list[list[str]]]:
    """A comparison as the columns and rows of a table, with means over concepts where there are several.

    Args:
        comparison: Results of one suite.
        width: Characters of a line. Runs that do not fit side by side stand below one another. Left out, they are
            side by side, with their concepts in their names.
    """
    runs = [(row["label"], row["concept"] or "", _cells(comparison, row)) for row in comparison.rows]
    for row in comparison.means():
        cells = {name: format_metric({"value": value}) for name, value in row["cells"].items()}
        runs.append((row["label"], f"mean of {row['concepts']}", cells))
    names = list(dict.fromkeys(name for *_, cells in runs for name in cells))
    lines = [[name, *(cells.get(name, "") for *_, cells in runs)] for name in names]
    several = len({concept for _, concept, _ in runs}) > 1
    if width is None:
        return ["", *(f"{label} ({concept})" if several and concept else label for label, concept, _ in runs)], lines
    if several:
        lines.insert(0, ["concept", *(concept for _, concept, _ in runs)])
    heads = ["", *(label for label, *_ in runs)]
    if sum(max(map(len, column)) + GAP for column in zip(heads, *lines, strict=True)) <= width:
        return heads, lines
    below: list[list[str]] = []
    for name in names:
        below.append([name, "", ""])
        below += [[f"  {label}", concept, cells[name]] for label, concept, cells in runs if cells.get(name)]
    keep = (0, 1, 2) if several else (0, 2)
    return [("metric, run", "concept", "value")[index] for index in keep], [[row[i] for i in keep] for row in below]


def _cells(comparison: Comparison, row: Settings) -> dict[str, str]:
    """Format the values of one run, by metric."""
    known = row["cells"] | dict.fromkeys(set(row["missing"]) - set(row["cells"]))
    cells = {name: format_metric(known[name]) for name in comparison.columns if name in known}
    if "seconds" in row:
        made = {"made in s": number(row["seconds"], ".1f"), "size in MB": number(row["size_bytes"], ".2f", 1e-6)}
        cells |= made
    return cells
