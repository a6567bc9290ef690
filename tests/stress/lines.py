"""Does something ahead of a chosen line of the package: interrupts, or kills."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import erasure

ROOT = Path(erasure.__file__).resolve().parent
ROOMS = tuple(str(folder) + os.sep for folder in (ROOT, ROOT.parent / "pipelines", ROOT.parent / "eval"))
"""Where lines are counted."""


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def kill() -> None:
    """What no process survives."""
    os.kill(os.getpid(), signal.SIGKILL)


class Lines:
    """Counts the lines of the package that this thread runs, and does something ahead of one of them.

    Args:
        at: Which line, from 1 on; 0 only counts.
        action: What is done there.
    """

    def __init__(self, at: int = 0, action: Callable[[], None] = interrupt) -> None:
        self.at, self.action, self.lines, self.reached, self.where = at, action, 0, False, ""

    def __enter__(self) -> Lines:
        self.before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self.before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(ROOMS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.reached = True
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.action()
        return self._line


def spread(lines: int, count: int, salt: str) -> list[int]:
    """Line numbers all over an operation: evenly, with a start that depends on the operation."""
    count = max(min(count, lines), 1)
    start = sum(map(ord, salt)) % max(lines // count, 1)
    return sorted({min(1 + start + n * lines // count, lines) for n in range(count)})
