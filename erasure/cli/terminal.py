"""Output of commands for people and programs: results, tables, JSON, remarks, progress."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from erasure.cli.processes import is_main_process
from erasure.cli.progress import Moving, Progress
from erasure.cli.streams import Remarks, printing
from erasure.progress import Lines, is_watched
from erasure.shown import message, number, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDE = 200
"""Columns of tables that go to a file or a pipe."""

NARROW = 24
"""Characters in which a column of texts can still be read."""

LARGEST = 100_000
"""Characters of a table."""

MOST = 2000, 60
"""Rows and columns of a table."""

PACKAGE = Path(__file__).resolve().parents[1]
"""Where this package is."""


def json_text(data: object) -> str:
    """Data as JSON on lines of its own, without control characters."""
    return json.dumps(data, indent=2, default=str).replace("\x7f", "\\u007f") + "\n"


class Terminal:
    """Results go to stdout, remarks and progress to stderr; all but the main process are silent.

    Every text goes out through here, cut and with its control characters visible (`erasure.shown`).
    """

    def __init__(self) -> None:
        self.speaks = is_main_process()
        self.json_only = False
        for stream in (sys.stdout, sys.stderr.stream if isinstance(sys.stderr, Remarks) else sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # What the terminal's encoding lacks is escaped as well.
                stream.reconfigure(errors="backslashreplace")

    def result(self, data: object) -> None:
        """Print data as JSON, whole: programs read it."""
        self.whole(json_text(data))

    def whole(self, text: str) -> None:
        """Print a text that programs read, whole; whoever made it has made its control characters visible."""
        if self.speaks:
            with printing():
                print(text, end="")

    def say(self, *lines: str) -> None:
        """Lines for people: on stdout, or on stderr when stdout is for JSON."""
        if self.speaks:
            with printing():
                for line in lines:
                    print(visible(line), file=sys.stderr if self.json_only else sys.stdout, flush=True)

    def flush(self) -> None:
        """Have everything written that was printed.

        Raises:
            BrokenPipeError: Whoever read it has gone.
            OutputError: It cannot be written for another reason.
        """
        if sys.stdout is not None:
            with printing():
                sys.stdout.flush()

    def complain(self, kind: str, text: object, remark: str = "") -> None:
        """A line on stderr about what went wrong.

        Args:
            kind: `error` or `warning`.
            text: The message, an exception or a warning for instance.
            remark: What is said behind it, however long it is.
        """
        print(f"erasure: {kind}: {message(text)}{remark}", file=sys.stderr, flush=True)

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int = 0,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """A warning of this package as one line on stderr, in place of `warnings.showwarning`; others are left out."""
        ours = category.__module__.startswith("erasure.") or Path(filename).is_relative_to(PACKAGE)
        if self.speaks and ours:
            self.complain("warning", message)

    @property
    def width(self) -> int:
        """Characters of a line of a table."""
        return self._console().width

    def _console(self) -> Console:
        from rich.console import Console

        console = Console(stderr=self.json_only)
        # A file or a pipe has no width, unless the user says one.
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = WIDE
        return console

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """Print a table; columns after the first that hold only numbers are set to the right.

        Where it is too wide for the terminal, each row is printed as a block, with a line for every column. Of a very
        large table the beginning is printed, and how much there is.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        if not self.speaks:
            return
        # Never strings: rich would look for markup in them.
        heads, *cells = [[visible(cell) for cell in row[: MOST[1]]] for row in (columns, *rows[: MOST[0]])]
        sizes = itertools.accumulate(sum(map(len, row)) for row in cells)
        cells = [row for row, size in zip(cells, sizes, strict=True) if size <= LARGEST]
        console = self._console()
        parts: list[RenderableType] = [Text(visible(title))] if title else []
        if _readable_width([heads, *cells]) > console.width:
            for first, *others in cells:
                block = Table.grid(padding=(0, 2))
                block.add_column()
                block.add_column(overflow="fold")
                for head, cell in zip(heads[1:], others, strict=True):
                    block.add_row(Text(f"  {head}"), Text(cell))
                parts += [Text(first), block, Text()]
        else:
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for index, head in enumerate(heads):
                numeric = index > 0 and all(re.match(r"^[-+]?[\d.]|^-?$", row[index]) for row in cells)
                table.add_column(Text(head), justify="right" if numeric else "left", overflow="fold")
            for row in cells:
                table.add_row(*map(Text, row))
            parts.append(table)
        with printing():
            for part in parts:
                console.print(part)
        if len(cells) < len(rows) or len(heads) < len(columns):
            shown = f"{len(cells)} of {len(rows)} rows and {len(heads)} of {len(columns)} columns"
            self.say(f"… {shown} are shown; --json gives all.")

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        """A progress bar of `total` steps on stderr; where that is no terminal, a line now and then."""
        if not is_watched():
            yield Progress(Lines("", total, shown=self.speaks))
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(), console=Console(stderr=True), disable=not self.speaks, transient=False,
        )  # fmt: skip
        with bar:
            yield Progress(Moving(bar, bar.add_task("", total=total)))


def _readable_width(rows: Sequence[Sequence[str]]) -> int:
    """Characters of a line that a table needs so that no word is broken and few texts are."""
    longest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [max(len(word) for cell in column for word in cell.split(" ")) for column in zip(*rows, strict=True)]
    return sum(max(word, min(text, NARROW)) + 3 for word, text in zip(words, longest, strict=True))


def format_metric(row: Mapping[str, object] | None) -> str:
    """`0.970 [0.932, 0.991]`; what was not or could not be measured is `-`."""
    if row is None or row.get("value") is None:
        return "-"
    value, low, high = (number(row.get(key), ".3f") for key in ("value", "low", "high"))
    return value if row.get("low") is None or row.get("high") is None else f"{value} [{low}, {high}]"
