"""Checks of names and texts from files: which may become a path, and how they are shown."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path

from erasure.errors import ArtifactError, ErasureError

LONGEST_NAME = 255
"""Largest number of bytes of a file name that all common file systems allow."""
FORBIDDEN = '<>:"/\\|?*'
"""Characters that lead elsewhere, or that some file system does not take."""
UNSEEN = ("Cc", "Cs", "Co", "Zl", "Zp")
"""Categories of control characters, halves of characters, and line breaks."""
DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
"""Names of devices on Windows, with any ending."""


def at_home(path: str | os.PathLike[str]) -> Path:
    """Make a path from what a user gives: `~` at its start is the home folder, as in a shell, which may not say so."""
    return Path(os.path.expanduser(path))


def is_line(text: str) -> bool:
    """Whether a text is one line without control characters and direction changes."""
    return not any(unicodedata.category(c) in UNSEEN or c in DIRECTIONS for c in text)


def shown(value: object, limit: int = 80) -> str:
    """Format a value for a message: on one line, control characters escaped, cut after `limit` characters."""
    # A long text is cut before it is escaped: the escapes of 2 MB are not made for the sake of 80 characters.
    text = repr(value[: limit + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."


def slug(text: str, longest: int = 100) -> str:
    """Convert a text to a name for any file system and the Hub: lower-case letters a to z, digits and hyphens.

    Each text has its own name, apart from case, spaces and hyphens: where more is lost (other scripts, accents,
    punctuation, the end of a long text), eight digits of the text's hash are appended. Only a text without any
    character has an empty name.

    Args:
        text: Any text.
        longest: Characters of the name at most, without the hash.

    Example:
        >>> slug("Van Gogh"), slug("Dalí")
        ('van-gogh', 'dali-e20edd5c')
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    latin = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    name = re.sub(r"[^a-z0-9]+", "-", latin)[:longest].strip("-")
    # A text that ends like a hash would have the name of another.
    if name == plain.replace(" ", "-") and name not in RESERVED and not re.search(r"\b[0-9a-f]{8}$", name):
        return name
    mark = hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name}-{mark}" if name else mark


def inside(folder: str | Path, *names: str, error: type[ErasureError] = ArtifactError) -> Path:
    """Make a path inside of a folder from names that were read from a file.

    Args:
        folder: Folder that must contain the path, after following links.
        *names: One name per level.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: A name is no plain name of a file (absolute, `..`, separators, drive letters, control characters,
            names of devices, more than 255 bytes), or a link leads out of the folder.
    """
    path = Path(folder)
    for name in names:
        problem = problem_of(name)
        if problem is not None:
            raise error(
                f"{shown(name)} cannot be the name of a file in {folder}: {problem}. Allowed: one plain name "
                f"of at most {LONGEST_NAME} bytes, no separators, no control characters; change it where it is made"
            )
        path /= name
    try:
        root, resolved = Path(folder).resolve(), path.resolve()
    except (OSError, RuntimeError) as reason:  # a loop of links
        raise error(f"{path} cannot be followed ({reason}): remove the link") from reason
    if not resolved.is_relative_to(root) or resolved == root:
        raise error(f"{path} leads out of {folder} through a link: remove the link, or copy the file there")
    return path


def problem_of(name: object) -> str | None:
    """Say why a name must not become the name of a file; `None` when it may."""
    if not isinstance(name, str) or not name:
        return "it is empty or no text"
    if name in (".", ".."):
        return "it names a folder above"
    if found := [character for character in name if character in FORBIDDEN]:
        return f"it holds {found[0]!r}"
    if found := [character for character in name if not character.isprintable()]:
        return f"it holds the character {found[0]!a}"
    if len(name.encode()) > LONGEST_NAME:
        return f"it has {len(name.encode())} bytes"
    if name[-1] in " .":
        return "it ends with a blank or a dot"
    if name.partition(".")[0].strip().lower() in RESERVED:
        return "it is the name of a device on Windows"
    return None
