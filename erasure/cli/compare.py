"""`erasure compare`: results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from erasure.cli.page import Table, write_page
from erasure.cli.terminal import Terminal, UsageError, format_metric, parse
from erasure.shown import number

if TYPE_CHECKING:
    from erasure.eval.comparison import Comparison
    from erasure.interop.protocols import Settings

GAP = 3
"""Columns of the terminal between two columns of a table."""
MOST_RUNS = 6
"""Runs that a page has side by side; more of them go below one another."""


@dataclass(kw_only=True)
class CompareOptions:
    """Put results side by side. Results of unlike recipes are refused: their numbers do not compare."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files `results.json`, or the folders that hold them."""
    label: tuple[str, ...] = ()
    """What each is called; the name of its folder when left out. One label for several results says that they are of
    one method, on different concepts: there is a mean over them."""
    out: Path | None = None
    """Write the table to this HTML file."""
    json: bool = False
    """Print JSON."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(CompareOptions, "compare", argv)
    terminal.json_only = options.json
    if not options.results:
        raise UsageError("nothing to compare: erasure compare FOLDER FOLDER ...")
    if options.label and len(options.label) != len(options.results):
        raise UsageError(
            f"{len(options.label)} --label for {len(options.results)} results: give one for each, or none"
        )
    from erasure.eval import compare

    comparison = compare(options.results, options.label)
    if options.json:
        terminal.result(comparison.to_dict() | {"means": comparison.means()})
    for part in [] if options.json else comparison.suites():
        columns, rows = layout(part, terminal.width)
        terminal.table(columns, rows, title=about(part))
    for method in comparison.repeated():
        terminal.say(
            f"No mean over concepts for {method}: one of them was measured more than once. --label tells runs apart."
        )
    if options.out is not None and terminal.speaks:
        parts = comparison.suites()
        tables = [Table(about(part), *layout(part, most=MOST_RUNS)) for part in parts]
        write_page(options.out, "Results side by side", tables)
        terminal.say(f"Wrote {options.out}")


def about(comparison: Comparison) -> str:
    """What a table of one suite shows."""
    kinds = sorted({f"{row['suite']} ({row['size']})" for row in comparison.rows})
    return f"Suite {', '.join(kinds)}. Values with 95 % intervals."


def layout(
    comparison: Comparison, width: int | None = None, most: int | None = None
) -> tuple[list[str], list[list[str]]]:
    """A comparison as the columns and rows of a table, with means over concepts where there are several.

    Args:
        comparison: Results of one suite.
        width: Characters of a line of the terminal. Runs that do not fit side by side stand below one another.
        most: Runs that stand side by side at most.
    """
    runs = [(row["label"], row["concept"] or "", _cells(comparison, row)) for row in comparison.rows]
    for row in comparison.means():
        cells = {name: format_metric({"value": row["cells"].get(name)}) for name in comparison.columns}
        runs.append((row["label"], f"mean of {row['concepts']}", cells))
    names = list(dict.fromkeys(name for *_, cells in runs for name in cells))
    lines = [[name, *(cells.get(name, "") for *_, cells in runs)] for name in names]
    if any(concept for _, concept, _ in runs):
        lines.insert(0, ["concept", *(concept for _, concept, _ in runs)])
    heads = ["", *(name for name, *_ in runs)]
    needed = sum(max(map(len, column)) + GAP for column in zip(heads, *lines, strict=True))
    if (width is None or needed <= width) and (most is None or len(runs) <= most):
        return heads, lines
    several = len({concept for _, concept, _ in runs}) > 1
    below: list[list[str]] = []
    for name in names:
        below.append([name, "", ""])
        below += [[f"  {label}", concept, cells[name]] for label, concept, cells in runs if name in cells]
    keep = (0, 1, 2) if several else (0, 2)
    return [("metric, run", "concept", "value")[index] for index in keep], [[row[i] for i in keep] for row in below]


def _cells(comparison: Comparison, row: Settings) -> dict[str, str]:
    """What stands in the column of a run."""
    cells = {name: format_metric(row["cells"].get(name)) for name in comparison.columns}
    if "seconds" in row:
        made = {"made in s": number(row["seconds"], ".1f"), "size in MB": number(row["size_bytes"], ".2f", 1e-6)}
        cells |= made
    return cells
