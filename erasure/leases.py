"""Leases on what threads share: many calls may draw at once, a switch of erasures waits for them and they for it.

A lease is released at the end of its `with` block. Should an interruption hit the very end of that block, it is
released with the frame that held it: a lease that nothing refers to any more does not count.

No lock is held anywhere, for an interruption could leave it held for ever. Requests stand in one list, whose order
decides between those that wait; appending to it and copying it are one step of the interpreter each.
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
"""Seconds between two looks at whether modules are free: short beside an image, long beside a look."""


class Lease:
    """The right to use modules, shared with other users or exclusive, for the length of a `with` block.

    Args:
        modules: What is used: modules, or other objects that threads share.
        exclusive: Whether nobody else may use them meanwhile, because they are about to change.
    """

    def __init__(self, modules: Iterable[object], *, exclusive: bool) -> None:
        self.modules = {id(module): module for module in modules}
        self.exclusive = exclusive
        self.thread = threading.get_ident()
        self.granted = self.over = False

    def __enter__(self) -> Lease:
        """Wait until the modules are free.

        Raises:
            AttachError: An exclusive lease is asked for inside a call of the same thread, which would wait for itself.
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
        """Give the modules back."""
        self.over = True

    def shares(self, other: Lease) -> bool:
        """Whether both use some module."""
        return not self.modules.keys().isdisjoint(other.modules)

    def is_call_of(self, other: Lease) -> bool:
        """Whether this is a call of the other's thread that uses the same modules."""
        return not self.exclusive and self.thread == other.thread and self.shares(other)

    def _granted(self) -> bool:
        live = _live()
        # A call that is going on already may use what it uses again, whoever waits.
        nested = any(lease.granted and lease.thread == self.thread for lease in live if lease.shares(self))
        before = live[: live.index(self)]
        rivals = [
            lease
            for lease in live
            if lease.thread != self.thread and lease.shares(self) and (lease.exclusive or self.exclusive)
        ]
        # A request that waits keeps later ones out, or a switch would never get its turn. So of two that are looked
        # at at once, one waits for the other, whichever is ahead.
        self.granted = not any(lease.granted or (lease in before and not nested) for lease in rivals)
        return self.granted


def _live() -> list[Lease]:
    leases = [reference() for reference in tuple(_LEASES)]
    return [lease for lease in leases if lease is not None and not lease.over]
