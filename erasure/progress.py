"""Progress of long work: a bar, lines where nobody sees a bar move, or a function of the caller's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol, Self

from erasure.shown import LABEL, visible

BETWEEN_LINES = 30.0
"""Seconds from one line to the next, of all work of a process."""


class Bar(Protocol):
    """What shows how far a work is."""

    def __enter__(self) -> Self:
        """Begin to show it."""

    def __exit__(self, *error: object) -> None:
        """Show it no longer."""

    def update(self, n: float = 1) -> object:
        """Go on by so many steps."""

    def set_postfix_str(self, s: str) -> object:
        """Say something of the last step."""


class Lines:
    """A bar for a file or a pipe: a line on stderr now and then, and none of work that is soon done."""

    last: ClassVar[float | None] = None
    """When a line was last written, or the first work began: short works one after the other share their lines."""

    def __init__(self, label: str, total: float, *, done: float = 0, unit: str = "", shown: bool = True) -> None:
        """Begin; see `bar`."""
        self.label, self.total, self.done, self.unit, self.shown = label, total, done, unit, shown
        self.started, self.postfix = time.monotonic(), ""
        if Lines.last is None:
            Lines.last = self.started

    def __enter__(self) -> Self:
        """Begin; a line comes when it is time for one."""
        return self

    def __exit__(self, *error: object) -> None:
        """End without a word."""

    def update(self, n: float = 1) -> None:
        """Go on by so many steps, and write a line if it is time for one."""
        self.done += n
        now = time.monotonic()
        if self.shown and sys.stderr is not None and now - (Lines.last or 0.0) >= BETWEEN_LINES:
            Lines.last = now
            print(self._line(now - self.started), file=sys.stderr, flush=True)

    def set_postfix_str(self, s: str) -> None:
        """Say something of the last step, in the next line."""
        self.postfix = s

    def _line(self, seconds: float) -> str:
        count = f"{self.done:g} of {self.total:g} {self.unit}s, " if self.unit else ""
        minutes, rest = divmod(int(seconds), 60)
        said = [f"{count}{min(self.done / (self.total or 1), 1):.0%}", f"{minutes}:{rest:02d}", self.postfix]
        return ": ".join(filter(None, (visible(self.label, LABEL), visible(", ".join(filter(None, said))))))


def is_watched() -> bool:
    """Whether stderr is a terminal, on which people see a bar move."""
    return sys.stderr is not None and sys.stderr.isatty()


def bar(
    label: str, total: float, *, done: float = 0, unit: str = "", shown: bool = True, stays: bool = True,
    form: str | None = None,
) -> Bar:  # fmt: skip
    """Make what shows the progress of a work: a bar in a terminal and in a notebook, and lines elsewhere.

    Args:
        label: What is done.
        total: Number of steps.
        done: Steps that were done before.
        unit: What a step makes.
        shown: Whether anything is shown.
        stays: Whether the bar stays when the work is done.
        form: Format of the bar; tqdm's own when left out.
    """
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    if not (is_watched() or issubclass(tqdm, tqdm_notebook)):
        return Lines(label, total, done=done, unit=unit, shown=shown)
    return tqdm(
        total=total, initial=done, desc=label, unit=unit or "it", disable=not shown, leave=stays, bar_format=form
    )  # type: ignore[no-any-return]


def between(progress: Callable[[float], None], start: float, stop: float) -> Callable[[float], None]:
    """Give the progress of one part of a work: a function of the share of that part that is done, 0 to 1.

    Args:
        progress: Progress of the whole work.
        start: Share of the whole work that is done when the part begins.
        stop: Share of the whole work that is done when the part ends.
    """
    return lambda share: progress(start + (stop - start) * share)


@contextmanager
def reporting(progress: bool | Callable[[float], None], label: str) -> Iterator[Callable[[float], None]]:
    """Give a function to call with the share of the work that is done, 0 to 1.

    Args:
        progress: `True` for a bar or lines on stderr, `False` for nothing, or the function itself.
        label: Label of the bar.
    """
    if callable(progress):
        yield progress
        return
    with bar(label, 100, shown=progress, stays=False, form="{desc}: {percentage:3.0f}%|{bar}| {elapsed}") as shown:
        done = 0

        def report(share: float) -> None:
            nonlocal done
            steps = max(int(100 * share) - done, 0)
            done += steps
            shown.update(steps)

        yield report
