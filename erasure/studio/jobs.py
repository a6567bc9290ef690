"""Jobs of the studio: how far each is, and that it can be cancelled."""

from __future__ import annotations

import threading
from typing import Protocol

from torch import Tensor

from erasure.errors import ErasureError
from erasure.interop.protocols import Callback


class CancelledError(ErasureError):
    """The user has cancelled a job."""


class Progress(Protocol):
    """Takes how far a job is."""

    def __call__(self, share: float, what: str) -> object:
        """Take the share that is done, 0-1, and what is being done."""


class Job:
    """Something that is being done for a session.

    Args:
        progress: Is told how far it is.
    """

    def __init__(self, progress: Progress) -> None:
        self.cancelled, self._progress, self.what = threading.Event(), progress, ""
        self.notes: list[str] = []

    def check(self) -> None:
        """Stop here if the user has cancelled.

        Raises:
            CancelledError: The user has.
        """
        if self.cancelled.is_set():
            raise CancelledError("cancelled: nothing was changed")

    def tell(self, share: float) -> None:
        """Say how far the job is, and stop here if the user has cancelled."""
        self.check()
        self._progress(min(max(share, 0.0), 1.0), self.what)

    def on_step(self, what: str, steps: int) -> Callback:
        """What diffusers calls after every step of a drawing."""
        self.what = what
        self.tell(0.0)

        def report(_: object, index: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            self.tell((index + 1) / max(steps, 1))
            return tensors

        return report


def silent(share: float, what: str) -> None:
    """Take how far a job is, and tell nobody."""
