"""Locks on the erasures of a pipeline that strangers draw with, and the log of what they asked for.

A locked pipeline refuses every way around its erasures that `erasure.guards` knows, cannot be switched, verifies
ahead of every call that the erasures are in force, and looks at prompts and pictures where it is told to. It keeps out
what comes in with the arguments of calls, and notices what changes the pipeline by mistake. It does not keep out
whoever runs Python code in the same process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasure.lazy import importer

if TYPE_CHECKING:
    from erasure.locking.audit import AuditLog, Verified, find, verify_log
    from erasure.locking.locks import SHARE, Costs, Lock, Looks, Seen, calling, lock, share, unlock

# No import of torch here: the command line verifies logs without it.

__all__ = [
    "SHARE",
    "AuditLog",
    "Costs",
    "Lock",
    "Looks",
    "Seen",
    "Verified",
    "calling",
    "find",
    "lock",
    "share",
    "unlock",
    "verify_log",
]

_LOCK = ("SHARE", "Costs", "Lock", "Looks", "Seen", "calling", "lock", "share", "unlock")
_HOMES = {
    **dict.fromkeys(("AuditLog", "Verified", "find", "verify_log"), "erasure.locking.audit"),
    **dict.fromkeys(_LOCK, "erasure.locking.locks"),
}

__getattr__ = importer(__name__, _HOMES)
