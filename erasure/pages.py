"""Pages and cards from the templates in `erasure/templates`: no value gets through one unescaped or uncut.

Templates do not need to escape anything: HTML escapes by itself, and every printed value is cut and made visible
(`erasure.shown`). Markdown does the same by its own rules.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from erasure.shown import cut, visible

FOLDER = Path(__file__).with_name("templates")

BLOCK = 20_000
"""Largest number of characters of a block of JSON."""

SPECIAL = re.compile(r"[\\`*_\[\]<>|~&$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""Pattern of characters that the Hub's and GitHub's Markdown treats as markup inside of a line."""


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def html_page(template: str, **values: object) -> str:
    """Fill an HTML template: one self-contained file without scripts, which loads nothing and sends nothing."""
    return _html().get_template(template).render(values)


def markdown_page(template: str, **values: object) -> str:
    """Fill a Markdown template."""
    return _markdown().get_template(template).render(values)


def png(content: bytes) -> Markup:
    """Embed a PNG image in the page, as a data URL."""
    return Markup("data:image/png;base64,") + base64.b64encode(content).decode("ascii")


def webp(content: bytes) -> Markup:
    """Embed a WebP image in the page, as a data URL."""
    return Markup("data:image/webp;base64,") + base64.b64encode(content).decode("ascii")


def relative_link(path: str) -> Markup:
    """Make a link to a file beside the page, which cannot name another scheme or host."""
    return escape("./" + quote(path, errors="replace"))


def json_block(data: object) -> Markup:
    """Format plain data as indented JSON for a `<pre>`."""
    return escape(cut(json.dumps(data, indent=1, default=str).replace("\x7f", "\\u007f"), BLOCK))


def markdown_text(value: object) -> Markdown:
    """Escape a value for Markdown, so that it has no link, image, HTML, table cell or emphasis."""
    return Markdown(SPECIAL.sub(r"\\\g<0>", visible(value)))


def code_span(value: object) -> Markdown:
    """Format a value as inline code, even with backticks in it. Not for cells of a table."""
    text = visible(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.strip("` ") != text or not text else ""
    return Markdown(f"{fence}{space}{text}{space}{fence}")


@cache
def _html() -> Environment:
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    environment = _environment(
        autoescape=True, finalize=lambda value: value if isinstance(value, Markup) else visible(value)
    )
    environment.filters |= {"json_block": json_block, "relative_link": relative_link}
    environment.globals |= {
        "style": Markup(style),
        "style_digest": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii"),
    }
    return environment


@cache
def _markdown() -> Environment:
    environment = _environment(
        autoescape=False, finalize=lambda value: value if isinstance(value, Markdown) else markdown_text(value)
    )
    environment.filters["code_span"] = code_span
    return environment


def _environment(**settings: Any) -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, **settings,
    )  # fmt: skip
