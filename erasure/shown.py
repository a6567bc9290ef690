"""Text that is shown to people: made short, on one line, and with every character visible.

Names, prompts, values of files and messages of exceptions can come from untrusted sources. Everything that is printed
to a terminal or a page passes through `visible`; pages and cards do this automatically (`erasure.pages`).
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

LIMIT = 2000
"""Largest number of characters of a text."""

LABEL = 40
"""Largest number of characters of a progress bar's label."""

SHORT = 100
"""Largest number of characters of text in the place of a number; it is cut without giving its length."""

UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that draw nothing or steer what is drawn: control, format (bidirectional, zero-width), surrogate,
private and unassigned characters, separators of lines and paragraphs."""

BLANK = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0))))
)
"""Invisible letters and marks in other categories."""


def visible(value: object, limit: int = LIMIT) -> str:
    r"""Convert a value to visible text.

    Args:
        value: A text, or any object with one.
        limit: Largest number of characters.

    Returns:
        One line. Characters that cannot be seen are written as Python escapes them (`\x1b`, `\u202e`); what is longer
        than `limit` is cut, and its length told if there is room.

    Example:
        >>> visible("a\x1b[2Jcat")
        'a\\x1b[2Jcat'
    """
    try:
        text = str(value)
    except (RecursionError, ValueError):
        # The value is nested too deeply, or is an integer with thousands of digits.
        text = f"<{type(value).__name__}>"
    seen = "".join(map(_seen, text[:limit]))
    return seen if len(text) <= limit and len(seen) <= limit else _ended(seen, len(text), limit)


def message(error: object, limit: int = LIMIT) -> str:
    """Convert the message of an exception or a warning to visible text; line breaks become spaces."""
    return visible(" ".join(str(error).split()), limit)


def cut(text: str, limit: int = LIMIT) -> str:
    """Cut a visible text to `limit` characters, and say how many there were."""
    return text if len(text) <= limit else _ended(text, len(text), limit)


def number(value: object, spec: str = ".4g", scale: float = 1.0) -> str:
    """Format `value * scale`; values that are not numbers, or are too large, are shown as by `visible`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return visible(value, SHORT)
    try:
        return format(value * scale if scale != 1 else value, spec)
    except (OverflowError, ValueError):
        return visible(value, SHORT)


def _seen(character: str) -> str:
    if unicodedata.category(character) in UNSEEN or character in BLANK:
        return character.encode("unicode_escape").decode("ascii")
    return character


def _ended(text: str, length: int, limit: int) -> str:
    told = f" ({length:,} characters in all)" if limit > SHORT else ""
    return f"{text[:limit]}…{told}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'hirm'?` with a blank in front, or nothing when no known word is near."""
    by_spelling = {_spelling(name): name for name in known}
    near = difflib.get_close_matches(_spelling(word), by_spelling, n=1)
    return f" Did you mean {by_spelling[near[0]]!r}?" if near else ""


def _spelling(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")
