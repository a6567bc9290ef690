"""Text that people are shown: whatever wrote it, it is short, on one line, and every character of it can be seen.

Names, prompts, values of files and messages of exceptions come from strangers. Everything that goes to a terminal or
onto a page passes through `visible`; pages and cards do it by themselves (`erasure.pages`).
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

LIMIT = 2000
"""Characters of one text that are shown."""

LABEL = 40
"""Characters of what a progress bar says."""

SHORT = 100
"""Characters of what stands where a number should. So short a text is cut without telling its length."""

UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that draw nothing or steer what is drawn: control, format (bidirectional, zero-width), surrogate,
private and unassigned characters, separators of lines and paragraphs."""

BLANK = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0))))
)
"""Letters and marks that draw nothing although their category says otherwise."""


def visible(value: object, limit: int = LIMIT) -> str:
    r"""Make a value fit to be shown.

    Args:
        value: A text, or anything that has one.
        limit: Characters that are kept.

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
        # Nested too deep, or a whole number of thousands of digits.
        text = f"<{type(value).__name__}>"
    seen = "".join(map(_seen, text[:limit]))
    return seen if len(text) <= limit and len(seen) <= limit else _ended(seen, len(text), limit)


def message(error: object, limit: int = LIMIT) -> str:
    """Make the message of an exception or a warning fit to be shown: line breaks become spaces."""
    return visible(" ".join(str(error).split()), limit)


def cut(text: str, limit: int = LIMIT) -> str:
    """Cut a text to `limit` characters and tell how many there were; for text whose characters can all be seen."""
    return text if len(text) <= limit else _ended(text, len(text), limit)


def number(value: object, spec: str = ".4g", scale: float = 1.0) -> str:
    """Write `value * scale` by a format specification; what is no number, or none of this size, as `visible` does."""
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
