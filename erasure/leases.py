"""Leases on modules that threads share: many calls can run at once; a switch of erasures waits for them.

A lease is released at the end of its `with` block. If an exception interrupts the very end of that block, the lease is
released with the frame that held it, because a lease without references does not count.

No lock is used, because an interruption could leave it locked for ever. Requests are in one list, whose order decides
between waiting ones; appending to it and copying it are atomic in the interpreter.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable
from types import TracebackType

from erasure.errors import AttachError

_LEASES: list[weakref.ref[Lease]] = []
_POLL = 0.002
"""Seconds between two checks whether modules are free: short compared with drawing an image, long compared with a
check."""


class Lease:
    """The right to use modules, shared or exclusive, for the duration of a `with` block.

    Args:
        modules: Modules, or other objects that threads share.
        exclusive: Whether no other thread may use them meanwhile, because they will be changed.
    """

    def __init__(self, modules: Iterable[object], *, exclusive: bool) -> None:
        self.modules = {id(module): module for module in modules}
        self.exclusive = exclusive
        self.thread = threading.get_ident()
        self.granted = self.over = False

    def __enter__(self) -> Lease:
        """Wait until the modules are free.

        Raises:
            AttachError: An exclusive lease is requested inside of a call of the same thread, which would wait for
                itself.
        """
        if self.exclusive and any(lease.is_call_of(self) for lease in _live()):
            raise AttachError(
                "erasures cannot be switched inside of a call that is drawing, for instance in a callback of its "
                "steps: an image belongs to one state. Switch ahead of the call, or behind it"
            )
        _LEASES.append(weakref.ref(self, _LEASES.remove))
        while not self._granted():
            time.sleep(_POLL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the modules."""
        self.over = True

    def shares(self, other: Lease) -> bool:
        """Whether both leases have a module in common."""
        return not self.modules.keys().isdisjoint(other.modules)

    def is_call_of(self, other: Lease) -> bool:
        """Whether this is a call of the other's thread that uses the same modules."""
        return not self.exclusive and self.thread == other.thread and self.shares(other)

    def _granted(self) -> bool:
        live = _live()
        # A running call may use its modules again, whoever is waiting.
        nested = any(lease.granted and lease.thread == self.thread for lease in live if lease.shares(self))
        before = live[: live.index(self)]
        rivals = [
            lease
            for lease in live
            if lease.thread != self.thread and lease.shares(self) and (lease.exclusive or self.exclusive)
        ]
        # A waiting request blocks later ones, because otherwise a switch might never get its turn. So of two requests
        # that are checked at the same time, one waits for the other, whichever is first.
        self.granted = not any(lease.granted or (lease in before and not nested) for lease in rivals)
        return self.granted


def _live() -> list[Lease]:
    leases = [reference() for reference in tuple(_LEASES)]
    return [lease for lease in leases if lease is not None and not lease.over]
