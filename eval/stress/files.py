"""What stress tests are given in files: known in recipes by their contents, not by their paths."""

from __future__ import annotations

import hashlib
from pathlib import Path

from erasure.errors import EvaluationError
from erasure.files import read_bytes

LIMIT = 16 * 2**30
"""Bytes of a file of weights."""


def fingerprint_of(source: str, what: str) -> str:
    """sha256 of a file of weights, or of those in a folder, 16 hex digits.

    Args:
        source: The path.
        what: What it is, for messages.

    Raises:
        EvaluationError: There is no such file, or no safetensors in the folder.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        state = "a folder without any *.safetensors" if path.is_dir() else "neither a file nor a folder"
        raise EvaluationError(f"the {what} {source} is {state}: give a file of safetensors, or the folder of one")
    if path.is_file() and path.suffix != ".safetensors":
        raise EvaluationError(f"the {what} {source} is no *.safetensors: nothing else is read, convert it first")
    found = hashlib.sha256()
    for file in files:
        found.update(read_bytes(file, LIMIT, error=EvaluationError))
    return found.hexdigest()[:16]
