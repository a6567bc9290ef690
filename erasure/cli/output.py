"""Folders that commands write their results into."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from erasure.cli.arguments import UsageError
from erasure.cli.processes import is_main_process


def check_output_folder(folder: Path, *, overwrite: bool = False, may_hold: bool = False) -> Path:
    """Make sure before any work is done that results can be written, and leave everything as it is.

    A command that is refused later, such as for a model that there is not, has made no folder then: whatever writes
    the first file makes it. Of several processes the main one looks for all.

    Args:
        folder: Where they go.
        overwrite: The user asked to replace what is there.
        may_hold: Files there are no obstacle, for commands that go on where they stopped.

    Returns:
        The folder, which need not be there.

    Raises:
        UsageError: It is a file, is not empty, or cannot be written.
    """
    if not is_main_process():
        return folder
    # Unlike those of `Path`, these give no error for names that cannot be.
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UsageError(f"--out {folder} is a file: name a folder")
    if os.path.isdir(folder) and not (overwrite or may_hold) and _holds_something(folder):
        raise UsageError(f"--out {folder} is not empty: name another folder, or add --overwrite")
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        # Whether it can be made is known when it has been.
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be made ({error.strerror}): name a folder that you may write"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
    if not writable:
        raise UsageError(f"--out {folder} cannot be written: name a folder that you may write")
    return folder


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be read ({error.strerror}): name a folder that you may read"
        ) from error
