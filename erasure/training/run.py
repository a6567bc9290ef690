"""Where a training keeps its state, so that a killed one goes on, and who may write there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from erasure import files
from erasure.files.folders import LOCK
from erasure.options import Count, CountOrZero, Options

RECIPE = "training.json"
CHECKPOINT = "training.ckpt"


@dataclass(frozen=True, kw_only=True)
class Run(Options):
    """What a training writes besides its result."""

    checkpoints: str | Path | None = None
    """Folder of checkpoints, validation images and logs. The same training started again goes on from the last
    checkpoint there; nothing is kept when left out."""
    save_every: Count = 50
    """Updates between two checkpoints."""
    validate_every: CountOrZero = 0
    """Updates between two grids of validation images; 0 for none."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Where accelerate logs losses and costs."""

    @property
    def folder(self) -> Path | None:
        """That of the checkpoints."""
        return None if self.checkpoints is None else Path(self.checkpoints)

    @contextmanager
    def opened(self, recipe: Mapping[str, object], main: bool = True) -> Iterator[None]:
        """Hold the folder: one training at a time, and the same one as before.

        Args:
            recipe: All that the training depends on, plain data.
            main: Whether this process writes; the others of the same training only read.

        Raises:
            TrainingError: Another process trains there, the folder holds something else, or cannot be written.
        """
        if self.folder is None or not main:
            yield
            return
        with files.held(self.folder, recipe, file=RECIPE, what="training", doing="training"):
            yield

    def discard(self) -> None:
        """Remove the folder of a training whose result is kept; logs and validation images stay."""
        if self.folder is not None:
            files.discard(self.folder, (CHECKPOINT, RECIPE))


__all__ = ["CHECKPOINT", "LOCK", "RECIPE", "Run"]
