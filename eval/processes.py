"""The processes of one evaluation, as `accelerate launch` started them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from erasure.errors import EvaluationError

if TYPE_CHECKING:
    from accelerate import PartialState

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are: torch's, and MPI's for CPUs."""


class Processes:
    """Rank, count and barrier; a single process needs none of accelerate.

    Raises:
        EvaluationError: Several processes were started but do not know of each other.
    """

    def __init__(self) -> None:
        self.count, self.rank = 1, 0
        self._state: PartialState | None = None
        if max(int(os.environ.get(name) or 1) for name in SIZES) > 1:
            from accelerate import PartialState

            # Without an accelerator accelerate must be told so, or every process takes itself for the only one.
            self._state = PartialState(cpu=not torch.accelerator.is_available())
            self.count, self.rank = self._state.num_processes, self._state.process_index
            if self.count == 1:
                raise EvaluationError(
                    "several processes were started but each takes itself for the only one, so they would write over "
                    "each other: set ACCELERATE_USE_CPU=true when there is no GPU"
                )

    @property
    def is_main(self) -> bool:
        """Whether this process writes the shared files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have arrived."""
        if self._state is not None:
            self._state.wait_for_everyone()
