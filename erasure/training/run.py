"""Where a training keeps its state, so that a killed one goes on, and who may write there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from erasure.cache import differences
from erasure.errors import TrainingError

RECIPE = "training.json"
CHECKPOINT = "training.ckpt"
LOCK = "lock"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training writes besides its result."""

    checkpoints: str | Path | None = None
    """Folder of checkpoints, validation images and logs. The same training started again goes on from the last
    checkpoint there; nothing is kept when left out."""
    save_every: int = 50
    """Updates between two checkpoints."""
    validate_every: int = 0
    """Updates between two grids of validation images; 0 for none."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Where accelerate logs losses and costs."""

    @property
    def folder(self) -> Path | None:
        """That of the checkpoints."""
        return None if self.checkpoints is None else Path(self.checkpoints)

    @contextmanager
    def opened(self, recipe: dict[str, Any], main: bool = True) -> Iterator[None]:
        """Hold the folder: one training at a time, and the same one as before.

        Args:
            recipe: All that the training depends on, plain data.
            main: Whether this process writes; the others of the same training only read.

        Raises:
            TrainingError: Another process trains there, the folder holds something else, or cannot be written.
        """
        folder = self.folder
        if folder is None or not main:
            yield
            return
        lock = FileLock(folder / LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise TrainingError(
                f"another process is training in {folder}: wait for it, or give another folder"
            ) from error
        except OSError as error:
            raise TrainingError(f"cannot write to {folder}: {error.strerror or error}") from error
        try:
            self._check(folder, json.loads(json.dumps(recipe)))
            yield
        finally:
            lock.release()

    def _check(self, folder: Path, recipe: dict[str, Any]) -> None:
        path = folder / RECIPE
        if path.is_file():
            try:
                known = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise TrainingError(f"{path} is damaged: delete {folder} to start anew") from error
            changed = differences(known, recipe)
            if changed:
                raise TrainingError(
                    f"{folder} holds a training of something else and cannot go on; {'; '.join(changed)}. Give the "
                    "same options, or another folder"
                )
            return
        if any(item.name != LOCK for item in folder.iterdir()):
            raise TrainingError(f"{folder} is not empty and holds no training: give another folder")
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(recipe, indent=2) + "\n")
        os.replace(temporary, path)

    def discard(self) -> None:
        """Remove the folder of a training whose result is kept; logs and validation images stay."""
        folder = self.folder
        if folder is None or not folder.is_dir():
            return
        for name in (CHECKPOINT, RECIPE, LOCK):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
