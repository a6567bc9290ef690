"""Progress of long work: a bar, or a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
        progress: `True` for a bar on stderr, `False` for nothing, or the function itself.
        label: Label of the bar.
    """
    if callable(progress):
        yield progress
        return
    from tqdm.auto import tqdm

    with tqdm(
        total=100,
        desc=label,
        disable=not progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
        leave=False,
    ) as bar:
        yield lambda share: bar.update(max(int(100 * share) - bar.n, 0))
