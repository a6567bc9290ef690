"""What every training script of Canvas shares: batches of scenes, learning rate, log."""

from __future__ import annotations

import json
import math
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


def log(path: Path, **row: Any) -> None:
    """Append one row to a JSON-lines log and print it."""
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(rounded) + "\n")
    print(json.dumps(rounded), flush=True)
