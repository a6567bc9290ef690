"""Repeated runs of text encoders in one encoding, until gates that open in one encoder are known to all others.

Pipelines run their text encoders in succession. What a later encoder finds in a batch of prompts would otherwise be
too late for earlier ones.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

REMEMBERED = 64
"""Batches of which it is remembered what readers found that were run by themselves."""
T = TypeVar("T")
Place = tuple[str, int]
"""What is looked for, and the number of the batch: every text encoder reads the batches of prompts in one order."""


class _Rounds:
    """Results of the readers of one encoding, in this round and in earlier ones."""

    def __init__(self) -> None:
        self.opened_by_others: dict[Place, dict[object, Tensor]] = {}
        self.found: dict[Place, dict[object, Tensor]] = {}
        self.batches: Counter[tuple[str, object]] = Counter()

    def place(self, subject: str, reader: object) -> Place:
        """Identify the batch that a reader reads next or now."""
        return subject, self.batches[subject, reader]

    def note(self, subject: str, reader: object, found: Tensor) -> None:
        """Record the result of a reader, and continue with its next batch."""
        self.found.setdefault(self.place(subject, reader), {})[reader] = found.detach()
        self.batches[subject, reader] += 1

    def news(self) -> set[str]:
        """List the subjects for which a reader found something after another reader had read."""
        subjects = set()
        for place, by_reader in self.found.items():
            for reader, own in by_reader.items():
                now, before = (
                    _others(known.get(place, {}), reader, *own.shape) for known in (self.found, self.opened_by_others)
                )
                if now is not None:
                    knew = own if before is None else own | before.to(own.device)
                    if bool((now.to(own.device) & ~knew).any()):
                        subjects.add(place[0])
        return subjects

    def go_on(self) -> None:
        """Start the next round."""
        for place, by_reader in self.found.items():
            known = self.opened_by_others.setdefault(place, {})
            for reader, own in by_reader.items():
                known[reader] = own | known[reader] if reader in known else own
        self.found, self.batches = {}, Counter()


class _Call(threading.local):
    """The encoding that a thread is in, and no other thread's."""

    rounds: _Rounds | None = None
    apart: _Rounds | None = None
    """What readers found that were run out of `together`, since somebody asked."""
    without_sharing: bool = False
    """Whether readers neither tell nor are told anything."""


_CALL = _Call()


def together(encode: Callable[[], T]) -> T:
    """Encode prompts by several text encoders, repeatedly until none finds anything that another has not seen.

    Inside of another such encoding it is a part of that one.

    Args:
        encode: Runs every text encoder, over the same batches of prompts in the same order; without side effects.

    Returns:
        What the last run gives.
    """
    if _CALL.rounds is not None:
        return encode()
    rounds = _CALL.rounds = _Rounds()
    try:
        while True:
            result = encode()
            # What is found only grows, so this ends.
            if not rounds.news():
                return result
            rounds.go_on()
    finally:
        _CALL.rounds = _CALL.apart = None


@contextmanager
def without_sharing() -> Iterator[None]:
    """Stop sharing between readers inside of the block, in this thread: for texts that are no prompts."""
    before, _CALL.without_sharing = _CALL.without_sharing, True
    try:
        yield
    finally:
        _CALL.without_sharing = before


def opened_by_others(subject: str, reader: object, rows: int, things: int) -> Tensor | None:
    """Get what the other readers of the same batch opened in earlier rounds, `(rows, things)` bool.

    Args:
        subject: What is looked for.
        reader: Who asks.
        rows: Prompts of its batch. A reader of another number of prompts tells what it found in any of them.
        things: How many things are looked for.

    Returns:
        `None` where there is nothing yet, and out of `together`.
    """
    rounds = _CALL.rounds
    if rounds is None or _CALL.without_sharing:
        return None
    return _others(rounds.opened_by_others.get(rounds.place(subject, reader), {}), reader, rows, things)


def share_opened(subject: str, reader: object, found: Tensor) -> None:
    """Share with the other readers of the same batch what is open in it, `(rows, things)` bool."""
    if _CALL.without_sharing:
        return
    if _CALL.rounds is not None:
        _CALL.rounds.note(subject, reader, found)
    elif not torch.compiler.is_compiling():
        if _CALL.apart is None or len(_CALL.apart.found) >= REMEMBERED:
            _CALL.apart = _Rounds()
        _CALL.apart.note(subject, reader, found)


def differing_subjects() -> set[str]:
    """List the subjects on which readers outside of `together` differed, since the last call."""
    apart, _CALL.apart = _CALL.apart, None
    return set() if apart is None else apart.news()


def _others(known: Mapping[object, Tensor], reader: object, rows: int, things: int) -> Tensor | None:
    """Combine what all readers except one opened, `(rows, things)`."""
    result = None
    for other, found in known.items():
        if other is reader or found.shape[1] != things:
            continue
        part = found if len(found) == rows else found.any(0).expand(rows, -1)
        result = part if result is None else result | part.to(result.device)
    return result
