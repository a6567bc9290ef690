"""Progress bars of commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from erasure.progress import Lines
from erasure.shown import LABEL, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Moving:
    """The task of a bar in a terminal, handled like `Lines`."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self.bar, self.task = bar, task

    @property
    def label(self) -> str:
        """Description of the work's present stage, in front of the bar."""
        return self.bar.tasks[0].description

    @label.setter
    def label(self, text: str) -> None:
        self.bar.update(self.task, description=visible(text, LABEL))

    def update(self, n: float = 1) -> None:
        """Go on by so many steps."""
        self.bar.advance(self.task, n)


class Progress:
    """Handle of a running progress bar."""

    def __init__(self, bar: Moving | Lines) -> None:
        self.bar = bar

    def stage(self, text: str) -> None:
        """Say what is being done now."""
        self.bar.label = text

    def advance(self, steps: float = 1) -> None:
        """Go on by so many steps."""
        self.bar.update(steps)

    @contextlib.contextmanager
    def part(self) -> Iterator[Callable[[float], None]]:
        """One step that reports the share of it that is done."""
        reached = 0.0

        def report(share: float) -> None:
            nonlocal reached
            self.advance(share - reached)
            reached = share

        yield report
        report(1.0)
