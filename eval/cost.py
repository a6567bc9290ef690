"""What an evaluation and the erasures in it cost."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from erasure.eval.rows import Record, Row, Rows

if TYPE_CHECKING:
    from erasure.eval.beside import Clock

SHARES = {"drawing_share": "calls of the pipeline", "denoiser_share": "the denoiser"}
"""Shares of the wall time of a run, as its costs have them, and what they are of."""


def evaluation_cost(rows: Rows, erasures: Sequence[Record], seconds: float, clock: Clock) -> Record:
    """The `cost` block of results.

    Times per image come from the rows, so they hold for a run that was killed and resumed, and for several processes.
    Shares are of this run, in this process: of its wall time, how much was spent in the pipeline's calls
    (`drawing_share`), and how much of all in the denoiser and its sampler (`denoiser_share`); `None` where nothing was
    drawn, or where a way to draw does not tell of its steps.

    Args:
        rows: Result rows by variant.
        erasures: Entries of the attached erasures.
        seconds: Wall time of this run.
        clock: How long this process drew.
    """
    times = {variant: [row["seconds"] for row in table if row.get("seconds")] for variant, table in rows.items()}
    return {
        "seconds": seconds,
        "drawing_share": clock.drawing / seconds if clock.drawing else None,
        "denoiser_share": clock.denoising / seconds if clock.drawing and clock.denoising is not None else None,
        "generation_seconds": sum(sum(values) for values in times.values()),
        "seconds_per_image": {variant: sum(v) / len(v) if v else None for variant, v in times.items()},
        "images_generated": sum(len(values) for values in times.values()),
        "baseline_from_cache": sum(not row.get("seconds") for row in rows.get("before", [])),
        "images_from_cache": sum(not row.get("seconds") for table in rows.values() for row in table),
        **_of_machine(erasures),
    }


def attack_cost(rows: Sequence[Row], erasures: Sequence[Record], seconds: float) -> Record:
    """The `cost` block of results of an attack.

    Times, steps and images come from the rows, so they hold for a run that was killed and resumed, and for several
    processes.

    Args:
        rows: One a prompt.
        erasures: Entries of the attached erasures.
        seconds: Wall time of this run.
    """
    return {
        "seconds": seconds,
        "attack_seconds": sum(row["seconds"] for row in rows),
        "gradient_steps": sum(row.get("steps", 0) for row in rows),
        "images_generated": sum(row["images"] + row.get("references", 0) - row.get("recalled", 0) for row in rows),
        "images_from_cache": sum(row.get("recalled", 0) for row in rows),
        **_of_machine(erasures),
    }


class Spent(NamedTuple):
    """What a part of an audit has cost, over all of its runs as far as its rows tell."""

    seconds: float
    """Wall time of its samples, or of its last run where that took longer."""
    drawn: int
    """Images that were drawn."""
    recalled: int
    """Images that an earlier part, or an earlier audit, had drawn."""

    @classmethod
    def of(cls, cost: Record) -> Spent:
        """Read the `cost` block of results."""
        times = [cost.get(name) or 0.0 for name in ("seconds", "attack_seconds", "generation_seconds")]
        return cls(max(times), cost.get("images_generated") or 0, cost.get("images_from_cache") or 0)


def _of_machine(erasures: Sequence[Record]) -> Record:
    return {
        "peak_memory_mb": peak_memory_mb(),
        "erase_seconds": sum(entry["seconds"] or 0 for entry in erasures),
        "artifact_bytes": sum(entry["size_bytes"] or 0 for entry in erasures),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def peak_memory_mb() -> float:
    """Most memory in use so far: of the GPU when one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    # The unit of ru_maxrss is kilobytes on Linux and bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
