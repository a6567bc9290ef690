"""A comparison as text for other programs: CSV with a line for every number, LaTeX tables for a paper."""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING

from erasure.shown import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from erasure.cli.page import Table
    from erasure.eval.comparison import Comparison

COLUMNS = ("suite", "size", "variant", "label", "concept", "model", "metric", "value", "low", "high", "n", "reason")
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
"""What LaTeX takes for markup, and how it is written."""
FORMULA = re.compile(r"^[=+\-@\t\r]")
"""Start of a text that spreadsheets take for a formula."""
INTERVAL = re.compile(r"(\S+) \[(\S+), (\S+)\]")


def as_csv(comparison: Comparison) -> str:
    """Every number on a line of its own, in full precision; one that could not be had has its reason."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in comparison.rows:
        about = [_cell(row[name]) for name in ("suite", "size", "variant", "label", "concept", "model")]
        for metric in comparison.columns:
            cell = row["cells"].get(metric)
            if cell is not None:
                numbers = ["" if cell[name] is None else repr(cell[name]) for name in ("value", "low", "high", "n")]
                writer.writerow([*about, _cell(metric), *numbers, ""])
            elif metric in row["missing"]:
                writer.writerow([*about, _cell(metric), "", "", "", "", _cell(row["missing"][metric])])
    return text.getvalue()


def _cell(value: object) -> str:
    """A text on one line that no spreadsheet reads as a formula."""
    text = "" if value is None else visible(value)
    return f"'{text}" if FORMULA.match(text) else text


def as_latex(tables: Sequence[Table]) -> str:
    """Tables for the package booktabs, one below the other.

    Args:
        tables: What each shows, its columns and its rows.
    """
    parts = []
    for about, columns, rows in tables:
        lines = [
            f"% {visible(about)}", rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule",
            _line(columns), r"\midrule", *map(_line, rows), r"\bottomrule", r"\end{tabular}",
        ]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(latex, cells)) + r" \\"


def latex(text: str) -> str:
    """A text as LaTeX shows it as it is; an interval behind a number is set smaller."""
    shown = "".join(SPECIAL.get(letter, letter) for letter in visible(text))
    return INTERVAL.sub(r"\1 {\\scriptsize [\2, \3]}", shown)
