"""Trajectories of the stock model on disk: the next training about the same prompts finds them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from erasure.cache import cache_folder, digest
from erasure.training.states import TrajectoryBuffer

LIMIT = 4 * 2**30
"""Bytes that the cached trajectories may take; the ones used longest ago go first."""


def fill(buffer: TrajectoryBuffer, model: str, accelerator: Any) -> None:
    """Fill a buffer of the stock model's trajectories, from disk if an earlier training left them.

    Args:
        buffer: To be filled.
        model: Fingerprint of the stock model.
        accelerator: Of accelerate.
    """
    path = cache_folder() / "trajectories" / f"{digest([model, buffer.recipe()])}.safetensors"
    states = _read(path)
    found = torch.tensor(int(states is not None), device=buffer.backbone.device)
    # Processes on other machines may have other caches: all read, or all roll out.
    if int(accelerator.reduce(found)) == accelerator.num_processes and states is not None:
        buffer.load_state_dict(states)
        return
    buffer.fill()
    if accelerator.is_main_process:
        _write(path, buffer)


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        states = load_file(path)
        os.utime(path)
        return states
    except (OSError, SafetensorError):
        return None


def _write(path: Path, buffer: TrajectoryBuffer) -> None:
    """Keep them, if there is room: they can be made again."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(buffer.state_dict(), temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            temporary.unlink()
        return
    kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
    size = 0
    for file in kept:
        size += file.stat().st_size
        if size > LIMIT and file != path:
            with contextlib.suppress(OSError):
                file.unlink()
