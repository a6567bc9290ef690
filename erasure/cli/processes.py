"""Processes of `accelerate launch`, of which one prints and writes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from erasure.cli.arguments import UsageError

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables in which `accelerate launch` and its launchers say which process this is."""
WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which they say how many processes there are."""


def process() -> tuple[int, int]:
    """Index of this process and how many there are, under `accelerate launch`; `(0, 1)` otherwise.

    Raises:
        UsageError: The environment says something else than numbers.
    """
    return _number_of(RANKS, 0), _number_of(WORLDS, 1)


def _number_of(names: Sequence[str], default: int) -> int:
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return default
    try:
        return int(os.environ[name])
    except ValueError:
        raise UsageError(
            f"the environment variable {name} is {os.environ[name]!r:.80}, expected a whole number: unset it, or "
            "start with accelerate launch"
        ) from None


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return process()[0] == 0
