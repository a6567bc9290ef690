"""Resumable training state in one file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


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
        """Load the last saved state, if there is one, and give the step to go on from."""
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
        self._started = time.monotonic() - self.seconds
        return self.step

    def save(self, step: int) -> None:
        """Write the state after `step` steps."""
        self.step, self.seconds = step, time.monotonic() - self._started
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.path.with_suffix(".partial")
        torch.save({**state, "step": step, "seconds": self.seconds}, temporary)
        os.replace(temporary, self.path)
