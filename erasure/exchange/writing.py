"""Writing a file of tensors for others: whole or not at all, and never over something else by accident."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from erasure import files
from erasure.errors import ArtifactError

ENDING = ".safetensors"


def check_out(out: str | Path, *, overwrite: bool) -> Path:
    """Check the path of a file that will be written, before any work is done.

    Raises:
        ArtifactError: It has another ending, is there already, or is a folder.
    """
    out = files.at_home(out)
    if out.suffix != ENDING:
        raise ArtifactError(f"cannot write {files.shown(str(out), 200)}: give the file the ending {ENDING}")
    if os.path.isdir(out):
        raise ArtifactError(f"cannot write {out}: it is a folder; choose another name")
    if os.path.lexists(out) and not overwrite:
        raise ArtifactError(f"{out} exists: choose another name, or overwrite it (--overwrite)")
    return out


def write_tensors(out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; what was there before is there until the new one is whole.

    Raises:
        ArtifactError: It cannot be written.
    """
    apart: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous().cpu()
        # Tensors that share memory cannot be written as they are.
        apart[name] = own.clone() if (place := own.untyped_storage().data_ptr()) in known else own
        known.add(place)
    with files.replacing(out) as temporary:
        save_file(apart, temporary, dict(metadata))
