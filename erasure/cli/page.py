"""A table and a picture as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from erasure.cli.terminal import UsageError

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{css}</style>
</head>
<body><main>
<h1>{title}</h1>
<p class="note">{about}</p>
{picture}<div class="scroll"><table><thead>{head}</thead><tbody>
{body}
</tbody></table></div>
{links}</main></body>
</html>
"""


def write_page(
    path: Path,
    title: str,
    about: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    picture: Path | None = None,
    links: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    Args:
        path: The file.
        title: Its heading.
        about: What the table shows.
        columns: Heads of the table.
        rows: Its cells.
        picture: A PNG to put into the page.
        links: Addresses, relative to the file, by what they lead to.

    Raises:
        UsageError: The file cannot be written.
    """
    from erasure.eval.report_style import CSS

    image = ""
    if picture is not None:
        encoded = base64.b64encode(picture.read_bytes()).decode()
        image = f'<p><img alt="" style="max-width: 100%" src="data:image/png;base64,{encoded}"></p>\n'
    listed = "".join(
        f'<li><a href="{html.escape(to)}">{html.escape(text)}</a></li>\n' for text, to in (links or {}).items()
    )
    content = PAGE.format(
        css=CSS,
        title=html.escape(title),
        about=html.escape(about),
        picture=image,
        head=_row("th", columns),
        body="\n".join(_row("td", row) for row in rows),
        links=f"<ul>\n{listed}</ul>\n" if listed else "",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another file") from error


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
