"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ERASURE_CACHE`, or `~/.cache/erasure`."""
    return Path(os.environ.get("ERASURE_CACHE") or Path.home() / ".cache" / "erasure")
