"""What the stock model draws, on disk: the next training about the same prompts finds it."""

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
"""Bytes that the cached trajectories may take, and the images; the ones used longest ago go first."""


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
        _write(path, buffer.state_dict())


def draw(source: NoisedImages, model: str) -> None:
    """Fill a source with the stock model's images, but for those that are on disk: a killed run goes on.

    Args:
        source: To be filled.
        model: Fingerprint of the stock model.
    """
    name = files.digest([model, source.recipe()])

    def kept(number: int, make: Callable[[], Tensor]) -> Tensor:
        count = min(CHUNK, source.trajectories - number * CHUNK)
        return _kept(f"{name}-{number:05}", "clean", (count, *source.backbone.latents.shape()), make)

    source.fill(kept)


def embed(source: NoisedImages, model: str, encoder: str, width: int, make: Callable[[], Tensor]) -> Tensor:
    """What an image encoder says of a source's images, `(images, width)`, from disk if an earlier training left it.

    Args:
        source: Filled.
        model: Fingerprint of the stock model.
        encoder: Fingerprint of the image encoder and of what prepares pictures for it.
        width: Of what it says of an image.
        make: Asks the image encoder.
    """
    name = files.digest([model, source.recipe(), encoder])
    return _kept(f"{name}-embeddings", "embeddings", (source.trajectories, width), make)


def _kept(name: str, key: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """A tensor about images from disk, if it is there and of the right form; else it is made and kept."""
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
    """What is kept there, if it is whole and of this buffer: what is not is made anew."""

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
    """The tensors of a file, if it is there, whole, of the right form, and all values are finite."""
    try:
        found = files.read_tensors(path, check=check)
        if not all(torch.isfinite(part).all() for part in found.values()):
            return None
        os.utime(path)
    except (ErasureError, OSError):
        return None
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Keep them, if there is room: they can be made again."""
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
