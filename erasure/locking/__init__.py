"""Locks on the erasures of a pipeline for untrusted callers, and the log of their calls.

A locked pipeline refuses every bypass of its erasures that `erasure.guards` knows, cannot be switched, verifies before
every call that the erasures are in force, and checks prompts and pictures if configured. It protects against the
arguments of calls, and notices accidental changes of the pipeline. It does not protect against code that runs in the
same Python process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasure.lazy import importer

if TYPE_CHECKING:
    from erasure.locking.audit import AuditLog, Verified, find, verify_log
    from erasure.locking.locks import SHARE, Costs, Lock, Looks, PictureJudgement, calling, lock, share, unlock

# This module does not import torch, so that the command line can verify logs quickly.

__all__ = [
    "SHARE",
    "AuditLog",
    "Costs",
    "Lock",
    "Looks",
    "PictureJudgement",
    "Verified",
    "calling",
    "find",
    "lock",
    "share",
    "unlock",
    "verify_log",
]

_LOCK = ("SHARE", "Costs", "Lock", "Looks", "PictureJudgement", "calling", "lock", "share", "unlock")
_HOMES = {
    **dict.fromkeys(("AuditLog", "Verified", "find", "verify_log"), "erasure.locking.audit"),
    **dict.fromkeys(_LOCK, "erasure.locking.locks"),
}

__getattr__ = importer(__name__, _HOMES)
