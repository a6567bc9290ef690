"""Threads that work until told to stop, and the two states that a pipeline is switched between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from erasure import ErasureManager

THREADS = 8
ATTACHED = ("delta", "low", "over", "pin", "itd")
A = {"delta": 1.0, "low": 1.0, "itd": 1.0, "over": 0.5, "pin": 1.0}
B = {"delta": 0.5, "low": 2.0, "itd": 2.0, "over": 1.0, "pin": 1.0}


class Crew:
    """Threads that go on until told to stop; whatever one of them raises is kept."""

    def __init__(self) -> None:
        self.stop, self.errors, self.threads = threading.Event(), [], []
        self.rounds: dict[str, int] = {}

    def go(self, name: str, work: Callable[[int], Any]) -> None:
        """Do some work again and again; it is told how often it was done."""

        def run() -> None:
            while not self.stop.is_set():
                try:
                    work(self.rounds.setdefault(name, 0))
                except BaseException as error:
                    self.errors.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
                    if len(self.errors) > 20:
                        self.stop.set()
                    return
                self.rounds[name] += 1

        self.threads.append(threading.Thread(target=run, name=name, daemon=True))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """They work inside of the block."""
        for thread in self.threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in self.threads:
                thread.join(60)
        assert not [thread.name for thread in self.threads if thread.is_alive()], "a thread hangs"

    def work(self, seconds: float, until: Callable[[], bool], patience: float = 60) -> None:
        """Let them work for some time, and longer until something is so: a busy machine gives turns rarely."""
        latest = time.monotonic() + patience
        self.stop.wait(seconds)
        while not self.stop.is_set() and not until() and time.monotonic() < latest:
            self.stop.wait(0.05)


def put(pipe: Any, state: dict[str, float]) -> None:
    """Put a state in force."""
    ErasureManager(pipe).set_erasures(list(state), list(state.values()))
