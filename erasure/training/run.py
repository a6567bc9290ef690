"""The folder of a training: checkpoints from which it can be resumed, and a lock against two trainings at once."""

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
    """Options of what a training writes in addition to its result."""

    checkpoints: str | Path | None = None
    """Folder of checkpoints, validation images and logs. The same training, started again, continues from the last
    checkpoint there. Nothing is saved when left out."""
    save_every: Count = 50
    """Number of updates between two checkpoints."""
    validate_every: CountOrZero = 0
    """Number of updates between two grids of validation images; 0 for none."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Tracker to which accelerate logs losses and costs."""

    @property
    def folder(self) -> Path | None:
        """Path of the folder of checkpoints, if there is one."""
        return None if self.checkpoints is None else Path(self.checkpoints)

    @contextmanager
    def opened(self, recipe: Mapping[str, object], main: bool = True) -> Iterator[None]:
        """Lock the folder, so that only one training runs there, and check that it is the same training as before.

        Args:
            recipe: Everything on which the training's result depends, as plain data.
            main: Whether this process writes; the other processes of the same training only read.

        Raises:
            TrainingError: Another process trains there, the folder holds something else, or cannot be written.
        """
        if self.folder is None or not main:
            yield
            return
        with files.held(self.folder, recipe, file=RECIPE, what="training", doing="training"):
            yield

    def discard(self) -> None:
        """Remove the checkpoints of a finished training; logs and validation images stay."""
        if self.folder is not None:
            files.discard(self.folder, (CHECKPOINT, RECIPE))


__all__ = ["CHECKPOINT", "LOCK", "RECIPE", "Run"]
