"""Tables and a picture as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from erasure.cli.arguments import UsageError

MOST = 6
"""Columns of a table that fit beside one another; of one with more, each row is a block of lines."""


class Table(NamedTuple):
    """A table of a page."""

    about: str
    """Sentence that says what the table shows."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(
    path: Path,
    title: str,
    tables: Sequence[Table],
    *,
    picture: Path | None = None,
    links: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    Args:
        path: The file.
        title: Its heading.
        tables: One below the other.
        picture: A PNG to put into the page.
        links: Paths of files, relative to this one, by what they lead to.

    Raises:
        UsageError: The file cannot be written.
    """
    from erasure.files import write_bytes

    write_bytes(path, page_of(title, tables, picture=picture, links=links).encode(), error=UsageError)


def page_of(
    title: str, tables: Sequence[Table], *, picture: Path | None = None, links: Mapping[str, str] | None = None
) -> str:
    """The page as a string; see `write_page`."""
    from erasure.pages import html_page, png

    image = None if picture is None else png(picture.read_bytes())
    return html_page("table.html", title=title, tables=tables, most=MOST, picture=image, links=links or {})
