"""Standard streams of commands, which may be closed or full."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from erasure.errors import ErasureError


class OutputError(ErasureError, OSError):
    """The standard output of a command cannot be written to."""


class Remarks:
    """The standard error stream of a command, which goes on with its work where nobody can read that any more."""

    def __init__(self, stream: TextIO | None) -> None:
        """Take a stream; `None` is one that was closed before the program began (`2>&-`)."""
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it where it cannot be written."""
        with self._or_drop():
            if self.stream is not None:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Have everything written, or drop what cannot be."""
        with self._or_drop():
            if self.stream is not None:
                self.stream.flush()

    def isatty(self) -> bool:
        """Whether people read it."""
        return self.stream is not None and self.stream.isatty()

    @contextlib.contextmanager
    def _or_drop(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self.stream is not None:
                drop(self.stream)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self.stream, name)


def drop(stream: TextIO | None) -> None:
    """Let what is still written to a stream go nowhere: Python would fail once more when it flushes it at exit."""
    if stream is None:
        return
    with contextlib.suppress(OSError):  # a stream in memory has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """A block that writes to the standard output.

    Raises:
        BrokenPipeError: Whoever read it has gone.
        OutputError: It cannot be written for another reason, such as a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        drop(sys.stdout)
        raise
    except OSError as reason:
        drop(sys.stdout)
        raise OutputError(
            f"cannot write to the standard output ({reason.strerror or reason}): write it to another place, or make "
            "room; files that were written are whole"
        ) from reason
