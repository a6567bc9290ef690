"""What every training script of Canvas shares: seeding, batches of scenes, learning rate, checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erasure.assets.scenes import Scene, caption, render, sample_scene


def batches(size: int, seed: int, *, pairs: float = 0.4) -> Iterator[tuple[list[Scene], torch.Tensor, list[str]]]:
    """Endless batches of (scenes, images `(size, 3, 64, 64)` in [-1, 1], captions)."""
    rng = np.random.default_rng(seed)
    while True:
        scenes = [sample_scene(rng, pairs=pairs) for _ in range(size)]
        images = np.stack([render(scene).image for scene in scenes])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        yield scenes, pixels, [caption(scene, rng) for scene in scenes]


def cosine(step: int, steps: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning rate: linear warm-up, then cosine decay to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


class Checkpoint:
    """Resumable training state in one file, written atomically.

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


def log(path: Path, **row: Any) -> None:
    """Append one row to a JSON-lines log and print it."""
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(rounded) + "\n")
    print(json.dumps(rounded), flush=True)
