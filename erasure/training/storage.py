"""A cache on disk of the stock model's trajectories and images, for further trainings on the same prompts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
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
from erasure.training.images import NoisedImages
from erasure.training.states import States
from erasure.training.trajectories import CHUNK, TrajectoryBuffer

if TYPE_CHECKING:
    from accelerate import Accelerator

LIMIT = 4 * 2**30
"""Largest size in bytes of the cached trajectories, and of the cached images; least recently used ones are removed
first."""


def fill(buffer: TrajectoryBuffer, model: str, accelerator: Accelerator) -> None:
    """Fill a buffer of the stock model's trajectories, from the cache if they are there.

    Args:
        buffer: Buffer to fill.
        model: Fingerprint of the stock model.
        accelerator: Processes, which share the work.
    """
    path = cache_folder() / "trajectories" / f"{files.digest([model, buffer.recipe()])}.safetensors"
    states = _read(path, buffer)
    found = torch.tensor(int(states is not None), device=buffer.backbone.device)
    # Processes on other machines may have other caches, so either all processes read, or all sample.
    if int(accelerator.reduce(found)) == accelerator.num_processes and states is not None:
        buffer.load_state_dict(states)
        return
    buffer.fill()
    if accelerator.is_main_process:
        _write(path, buffer.state_dict())


def draw(source: NoisedImages, model: str) -> None:
    """Fill a source with the stock model's images; those in the cache are read, so an interrupted run continues.

    Args:
        source: Source to fill.
        model: Fingerprint of the stock model.
    """
    name = files.digest([model, source.recipe()])

    def kept(number: int, make: Callable[[], Tensor]) -> Tensor:
        count = min(CHUNK, source.trajectories - number * CHUNK)
        return _kept(f"{name}-{number:05}", "clean", (count, *source.backbone.latents.shape()), make)

    source.fill(kept)


def embed(source: NoisedImages, model: str, encoder: str, width: int, make: Callable[[], Tensor]) -> Tensor:
    """Encode a source's images by an image encoder, `(images, width)`, or read the result from the cache.

    Args:
        source: Source of the images, which is filled already.
        model: Fingerprint of the stock model.
        encoder: Fingerprint of the image encoder and of its preprocessing.
        width: Width of an image's embedding.
        make: Runs the image encoder.
    """
    name = files.digest([model, source.recipe(), encoder])
    return _kept(f"{name}-embeddings", "embeddings", (source.trajectories, width), make)


def _kept(name: str, key: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """Read a tensor from the cache if it is there with the right shape; otherwise compute and save it."""
    path = cache_folder() / "images" / f"{name}.safetensors"

    def check(infos: Mapping[str, TensorInfo]) -> None:
        if {key: info.shape for key, info in infos.items()} != {key: shape}:
            raise ArtifactError(f"{path} holds no images of this training")

    found = _tensors(path, check)
    if found is None:
        found = {key: make().cpu().contiguous()}
        _write(path, found)
    return found[key]


def _read(path: Path, buffer: TrajectoryBuffer) -> dict[str, Tensor] | None:
    """Read cached trajectories if the file is intact and fits this buffer; otherwise give `None`."""

    def check(infos: Mapping[str, TensorInfo]) -> None:
        rows = {info.shape[:1] for info in infos.values()}
        if set(infos) != set(States._fields) - {"truth"} or rows != {(len(buffer),)}:
            raise ArtifactError(f"{path} holds no trajectories of this training")
        if any(infos[name].shape != (len(buffer),) for name in ("t", "scene", "guidance")):
            raise ArtifactError(f"{path} holds trajectories with steps of another shape")
        x, own, null, asked = (infos[name].shape for name in ("x", "own", "null", "asked"))
        questions = len(buffer.scenes[0].asks)
        latents = tuple(buffer.backbone.noise([0]).shape[1:])
        if not x[1:] == own[1:] == null[1:] == latents or asked[1:] != (questions, *latents):
            raise ArtifactError(f"{path} holds trajectories of other latents")

    states = _tensors(path, check)
    if states is None:
        return None
    scene = states["scene"]
    return states if int(scene.min()) >= 0 and int(scene.max()) < len(buffer.scenes) else None


def _tensors(path: Path, check: Callable[[Mapping[str, TensorInfo]], None]) -> dict[str, Tensor] | None:
    """Read the tensors of a file, or give `None` if it is damaged, fails the check or has NaN or infinity."""
    try:
        found = files.read_tensors(path, check=check)
        if not all(torch.isfinite(part).all() for part in found.values()):
            return None
        os.utime(path)
    except (ErasureError, OSError):
        return None
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save tensors if there is room; a full disk is no error, because they can be computed again."""
    try:
        with files.replacing(path) as temporary:
            save_file(tensors, temporary)
    except (ErasureError, SafetensorError):
        return
    with contextlib.suppress(OSError):  # another process tidies up as well
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
        size = 0
        for file in kept:
            size += file.stat().st_size
            if size > LIMIT and file != path:
                file.unlink()
