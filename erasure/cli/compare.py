"""`erasure compare`: results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from erasure.cli.page import write_page
from erasure.cli.terminal import Terminal, UsageError, format_metric, parse
from erasure.shown import number

if TYPE_CHECKING:
    from erasure.eval.results import Comparison


@dataclass(kw_only=True)
class CompareOptions:
    """Put results side by side. Results of unlike recipes are refused: their numbers do not compare."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files `results.json`, or the folders that hold them."""
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
    from erasure.eval import results

    runs = [results.Results.load(path) for path in options.results]
    comparison = results.compare(runs)
    kinds = sorted({f"{run.suite} ({run.size})" for run in runs})
    about = f"Suite {', '.join(kinds)}. Values with 95 % intervals."
    columns, rows = layout(comparison)
    if options.json:
        terminal.result(comparison.to_dict())
    else:
        terminal.table(columns, rows, title=about)
    if options.out is not None and terminal.speaks:
        write_page(options.out, "Results side by side", about, columns, rows)
        terminal.say(f"Wrote {options.out}")


def layout(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A comparison as the columns and rows of a table, with the mean over concepts where there are several."""
    rows = []
    for row in comparison.rows:
        cells = [format_metric(row["cells"].get(column)) for column in comparison.columns]
        made = (
            [number(row["seconds"], ".1f"), number(row["size_bytes"], ".2f", 1e-6)] if "seconds" in row else ["", ""]
        )
        rows.append([row["label"], row["variant"], row["concept"] or "", *cells, *made])
    for row in comparison.means():
        if row["concepts"] > 1:
            cells = [format_metric({"value": row["cells"].get(column)}) for column in comparison.columns]
            rows.append([row["label"], row["variant"], f"mean of {row['concepts']}", *cells, "", ""])
    return ["", "variant", "concept", *comparison.columns, "made in s", "MB"], rows
