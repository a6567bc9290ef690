"""Somebody's file of tensors, read without running anything in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from erasure import files
from erasure.errors import ArtifactError
from erasure.files.recognise import ERASURE_FILE

ARCHIVES = (".bin", ".ckpt", ".pt", ".pth")
"""Endings of what `torch.save` writes, which can be read without running code where it holds tensors only."""
CONVERT = (
    "convert it where you trust it: load it there with torch.load, and write its tensors with "
    "safetensors.torch.save_file"
)
WRAPPERS = ("state_dict", "model", "weights")
"""Keys under which trainers put all tensors."""
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
DEEPEST = 4
PIECE = 2**20


@dataclass(frozen=True)
class Source:
    """The tensors and the header of a file."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Texts in its header; whoever wrote the file chose them."""

    @property
    def shown(self) -> str:
        """The path, for messages."""
        return files.shown(str(self.path), 200)[1:-1]

    def digest(self) -> str:
        """sha256 of the file."""
        found = hashlib.sha256()
        with open(self.path, "rb") as file:
            while piece := file.read(PIECE):
                found.update(piece)
        return found.hexdigest()


def read_source(path: str | Path) -> Source:
    """Read a file of tensors.

    Args:
        path: A `.safetensors` file, or what `torch.save` wrote of tensors alone.

    Raises:
        ArtifactError: It is missing, damaged, no such file, holds more than tensors, or no tensor at all.
    """
    path = files.at_home(path)
    shown = files.shown(str(path), 200)[1:-1]
    if os.path.isdir(path):
        if os.path.lexists(path / ERASURE_FILE):
            raise ArtifactError(f"{shown} is an erasure already: attach it with pipe.load_erasure(FOLDER)")
        held = sorted(name for name in os.listdir(path) if name.endswith((".safetensors", *ARCHIVES)))
        raise ArtifactError(
            f"{shown} is a folder: name the file with the weights"
            + (f" in it ({', '.join(map(files.shown, held[:5]))})" if held else "; it holds none of a known kind")
        )
    ending = path.suffix.lower()
    if ending == ".safetensors":
        metadata = files.read_metadata(path)
        source = Source(path, files.read_tensors(path), metadata)
    elif ending in ARCHIVES:
        try:
            held = files.read_archive(path)
        except ArtifactError as error:
            raise ArtifactError(f"{error}. If it is whole, {CONVERT}") from error
        source = Source(path, _flat(held, shown))
    else:
        raise ArtifactError(
            f"{shown} is not read: expected .safetensors, or {', '.join(ARCHIVES)} with nothing but tensors; {CONVERT}"
        )
    if not source.tensors:
        raise ArtifactError(f"{shown} holds no tensors: fetch it again")
    return source


def _flat(held: object, shown: str, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Flatten nested dicts of tensors, with the names of networks as prefixes."""
    if not isinstance(held, Mapping) or depth > DEEPEST:
        raise ArtifactError(f"{shown} holds a {type(held).__name__}, expected tensors by name; {CONVERT}")
    found: dict[str, Tensor] = {}
    for name, value in held.items():
        if not isinstance(name, str):
            raise ArtifactError(f"{shown} names a tensor {files.shown(name)}, which is no text; {CONVERT}")
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                raise ArtifactError(f"{shown}: tensor {files.shown(name)} is sparse; write it as a plain one")
            found[f"{prefix}{name}"] = value.detach().cpu()
        elif isinstance(value, Mapping) and not value:
            continue
        elif isinstance(value, Mapping) and name in (*WRAPPERS, *NETWORKS):
            found |= _flat(value, shown, f"{prefix}{name}." if name in NETWORKS else prefix, depth + 1)
        elif isinstance(value, bool | int | float | str | None):
            continue  # A step, an epoch, a version.
        else:
            raise ArtifactError(
                f"{shown} holds {files.shown(name)}, a {type(value).__name__} that is no tensor and no network known "
                f"here ({', '.join(NETWORKS)}): it would be lost; {CONVERT}"
            )
    return found
