"""Lists that users keep: the lines of a text, and the rows of a CSV or TSV file, none of which is read as another."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from erasure.errors import ArtifactError, ErasureError
from erasure.files.names import at_home, shown
from erasure.files.reading import JSON_LIMIT, read_text

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Character between the cells of a table, by the ending of its file."""
Row = tuple[int, dict[str, str]]
"""Number of a row's last line, and its cells by column."""


def lines_of(text: str) -> list[str]:
    """Split a text at its line breaks only: `str.splitlines` also splits at characters that are part of texts."""
    return re.split(r"\r\n|\r|\n", text)


def read_table(
    text: str, where: str, separator: str, *, error: type[ErasureError] = ArtifactError,
    column: Callable[[str], str] = str.strip,
) -> tuple[list[str], Iterator[Row]]:  # fmt: skip
    """Read a table whose first line names the columns; empty rows are left out.

    Args:
        text: Content of the file.
        where: The file, for messages.
        separator: Character between cells.
        error: Class of the errors that are raised.
        column: Gives the name of a column as it is looked up.

    Returns:
        The names of the columns, and the rows, which are checked as they are taken.

    Raises:
        ErasureError: Two columns have one name, a row has more or fewer cells than the first line, or quotes are not
            closed.
    """
    rows = _rows(text, where, separator, error)
    _, cells = next(rows, (0, [""]))
    names = [column(cell) for cell in cells]
    if double := next((name for name in names if name and names.count(name) > 1), None):
        raise error(f"{where} has two columns called {shown(double)}: rename or delete one")

    def named() -> Iterator[Row]:
        for line, values in rows:
            if len(values) != len(names):
                raise error(
                    f"{where}, line {line} has {len(values)} cells, the first line {len(names)}: put texts with "
                    f"{separator!r} in double quotes"
                )
            yield line, dict(zip(names, values, strict=True))

    return names, named()


def _rows(text: str, where: str, separator: str, error: type[ErasureError]) -> Iterator[tuple[int, list[str]]]:
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for cells in table:
            if any(cell.strip() for cell in cells):
                yield table.line_num, cells
    except csv.Error as reason:
        raise error(f"{where}, line {table.line_num} cannot be read as CSV ({reason}): check its quotes") from reason


def read_texts(
    path: str | Path, limit: int = JSON_LIMIT, *, column: str = "prompt", error: type[ErasureError] = ArtifactError
) -> list[str]:
    """Read the texts of a file: one on each line, or a column of a CSV or TSV file; empty ones are left out.

    Args:
        path: The file.
        limit: Most bytes.
        column: Name of the column.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: See `read_text` and `read_table`; or there is no such column, or the file is JSON.
    """
    path = at_home(path)
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl"):
        raise error(f"{path} is JSON; expected one {column} on each line, or a .csv or .tsv file with '{column}'")
    text = read_text(path, limit, error=error)
    texts = lines_of(text)
    if ending in SEPARATORS:
        names, rows = read_table(text, str(path), SEPARATORS[ending], error=error)
        if not any(names):
            raise error(
                f"{path} is empty; expected a first line with the names of the columns, one of them '{column}'"
            )
        if column not in names:
            raise error(
                f"{path} has the columns {shown(names)}, expected one named '{column}': rename the column with the "
                f"{column}s"
            )
        texts = [row[column] for _, row in rows]
    return [plain for each in texts if (plain := " ".join(each.split()))]
