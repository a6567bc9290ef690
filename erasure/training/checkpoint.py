"""Resumable training state in one file."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import torch

from erasure.errors import TrainingError


class Checkpoint:
    """Resumable training state in one file, written atomically and read as tensors only.

    Args:
        path: The file.
        parts: Everything with `state_dict` and `load_state_dict`, by name.
    """

    def __init__(self, path: Path, **parts: Any) -> None:
        self.path, self.parts = path, parts
        self.step, self.seconds = 0, 0.0
        self._started = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the last saved state, if there is one, and give the step to go on from.

        Raises:
            TrainingError: The file is damaged, or of a training of something else.
        """
        if self.path.exists():
            try:
                state = torch.load(self.path, map_location="cpu", weights_only=True)
                for name, part in self.parts.items():
                    part.load_state_dict(state[name])
                self.step, self.seconds = state["step"], state["seconds"]
            except Exception as error:  # torch, pickle and zip files have many
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise TrainingError(
                    f"the checkpoint {self.path} cannot be read ({reason}): delete it to start anew"
                ) from error
        self._started = time.monotonic() - self.seconds
        return self.step

    def save(self, step: int) -> None:
        """Write the state after `step` steps.

        Raises:
            TrainingError: It cannot be written; the last one is still there.
        """
        seconds = time.monotonic() - self._started
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        content = io.BytesIO()
        torch.save({**state, "step": step, "seconds": seconds}, content)
        temporary = self.path.with_suffix(".partial")
        try:
            temporary.write_bytes(content.getbuffer())
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise TrainingError(
                f"cannot write the checkpoint of step {step} to {self.path.parent} ({error.strerror or error}); the "
                f"one of step {self.step} is kept: make room, and run the same again to go on from there"
            ) from error
        self.step, self.seconds = step, seconds
