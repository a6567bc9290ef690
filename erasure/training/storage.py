"""Trajectories of the stock model on disk: the next training about the same prompts finds them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from erasure import files
from erasure.cache import cache_folder
from erasure.errors import ArtifactError, ErasureError
from erasure.files import TensorInfo
from erasure.training.states import States, TrajectoryBuffer

if TYPE_CHECKING:
    from accelerate import Accelerator

LIMIT = 4 * 2**30
"""Bytes that the cached trajectories may take; the ones used longest ago go first."""


def fill(buffer: TrajectoryBuffer, model: str, accelerator: Accelerator) -> None:
    """Fill a buffer of the stock model's trajectories, from disk if an earlier training left them.

    Args:
        buffer: To be filled.
        model: Fingerprint of the stock model.
        accelerator: Of accelerate.
    """
    path = cache_folder() / "trajectories" / f"{files.digest([model, buffer.recipe()])}.safetensors"
    states = _read(path, buffer)
    found = torch.tensor(int(states is not None), device=buffer.backbone.device)
    # Processes on other machines may have other caches: all read, or all roll out.
    if int(accelerator.reduce(found)) == accelerator.num_processes and states is not None:
        buffer.load_state_dict(states)
        return
    buffer.fill()
    if accelerator.is_main_process:
        _write(path, buffer)


def _read(path: Path, buffer: TrajectoryBuffer) -> dict[str, Tensor] | None:
    """What is kept there, if it is whole and of this buffer: what is not is made anew."""

    def check(infos: Mapping[str, TensorInfo]) -> None:
        if set(infos) != set(States._fields) or any(info.shape[:1] != (len(buffer),) for info in infos.values()):
            raise ArtifactError(f"{path} holds no trajectories of this training")
        if any(infos[name].shape != (len(buffer),) for name in ("t", "scene", "guidance")):
            raise ArtifactError(f"{path} holds trajectories with steps of another shape")
        x, own, null, asked = (infos[name].shape for name in ("x", "own", "null", "asked"))
        questions = len(buffer.scenes[0].asks)
        latents = tuple(buffer.backbone.noise([0]).shape[1:])
        if not x[1:] == own[1:] == null[1:] == latents or asked[1:] != (questions, *latents):
            raise ArtifactError(f"{path} holds trajectories of other latents")

    try:
        states = files.read_tensors(path, check=check)
        if not all(torch.isfinite(part).all() for part in states.values()):
            return None
        os.utime(path)
    except (ErasureError, OSError):
        return None
    scene = states["scene"]
    return states if int(scene.min()) >= 0 and int(scene.max()) < len(buffer.scenes) else None


def _write(path: Path, buffer: TrajectoryBuffer) -> None:
    """Keep them, if there is room: they can be made again."""
    try:
        with files.replacing(path) as temporary:
            save_file(buffer.state_dict(), temporary)
    except (ErasureError, SafetensorError):
        return
    with contextlib.suppress(OSError):  # another process tidies up as well
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
        size = 0
        for file in kept:
            size += file.stat().st_size
            if size > LIMIT and file != path:
                file.unlink()
