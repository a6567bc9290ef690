"""Weights of detectors: finding them, telling them by their sha256, and reading those kept in eight bits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from erasure.errors import ArtifactError
from erasure.files import TensorInfo, read_tensors, shown

N = TypeVar("N", bound=nn.Module)

RANGE = ".range"
"""Ending of the tensor with the smallest value and the step of a tensor in eight bits, `(2,)` float64."""
COUNTS = "num_batches_tracked"
"""Counter of batch norms, which plays no part once they are trained."""


def sha256(path: str | Path) -> str:
    """Compute the sha256 of a file, 64 hex digits.

    Raises:
        ArtifactError: It cannot be read.
    """
    try:
        status = os.stat(path)
        return _sha256(str(path), status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): check the path, or fetch the file again") from error


@lru_cache(maxsize=64)
def _sha256(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_into(network: N, tensors: Mapping[str, Tensor], source: str | Path) -> N:
    """Load a file's weights into a network, and switch it to evaluation.

    Args:
        network: What they belong to, on any device; weights that it has are replaced.
        tensors: By the names of the network's own.
        source: Where they are from, for messages.

    Raises:
        ArtifactError: They are not those of this network, or not finite.
    """
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items() if not name.endswith(COUNTS)}
    there = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith(COUNTS)}
    if there != wanted:
        wrong = next(name for name in {**wanted, **there} if there.get(name) != wanted.get(name))
        raise ArtifactError(
            f"{source} holds weights of another network: {shown(wrong)} has the shape {there.get(wrong)}, expected "
            f"{wanted.get(wrong)}; fetch it again"
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArtifactError(f"{source} holds NaN or infinity, with which nothing is seen: fetch it again")
    network.to_empty(device="cpu")
    network.load_state_dict({name: tensors[name].float() for name in wanted}, strict=False)
    return network.eval().requires_grad_(False)


def read_eight_bits(path: str | Path) -> dict[str, Tensor]:
    """Read weights that are stored as eight-bit integers, as float32.

    Each tensor NAME has another beside it, NAME.range, with the smallest value and the step of its numbers: a weight
    is `number * step + smallest`. One in float32 has none, and is taken as it is.

    Raises:
        ArtifactError: The file is damaged, or not of this kind.
    """

    def check(infos: Mapping[str, TensorInfo]) -> None:
        for name, info in infos.items():
            if name.endswith(RANGE):
                fits = info.dtype == torch.float64 and info.shape == (2,) and name.removesuffix(RANGE) in infos
            else:
                fits = info.dtype == (torch.uint8 if f"{name}{RANGE}" in infos else torch.float32)
            if not fits:
                raise ArtifactError(f"{path}: {shown(name)} is no tensor in eight bits with its range: fetch it again")

    tensors = read_tensors(path, check=check)
    found = {}
    for name, numbers in tensors.items():
        if name.endswith(RANGE):
            continue
        found[name] = numbers
        if f"{name}{RANGE}" in tensors:
            smallest, step = tensors[f"{name}{RANGE}"]
            # In double precision, as JavaScript computes it, and rounded once.
            found[name] = (numbers.double() * step + smallest).float()
    return found
