"""Where erasures and models are looked for: in ComfyUI's folders of models, anywhere on the disk, on the Hub."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from erasure import Erasure
from erasure.artifact import FILES, REPOSITORY, is_local
from erasure.errors import ArtifactError

ERASURES = "erasures"
"""ComfyUI's folder of erasures, `models/erasures`; further ones stand in `extra_model_paths.yaml`."""
MODELS = ("diffusers", "checkpoints")
"""ComfyUI's folders of models that remove objects."""


def register() -> None:
    """Tell ComfyUI of the folder of erasures."""
    import folder_paths

    folder_paths.add_model_folder_path(ERASURES, os.path.join(folder_paths.models_dir, ERASURES))


def found_in(kind: str, name: str) -> Path | None:
    """A folder or file of this name below one of ComfyUI's folders; `None` where there is none, or it leads out."""
    import folder_paths

    for root in folder_paths.get_folder_paths(kind):
        place = Path(root, name)
        inside = Path(os.path.realpath(root)) in Path(os.path.normpath(Path(os.path.realpath(root), name))).parents
        if inside and os.path.lexists(place):
            return place
    return None


def erasure_at(source: str) -> Path | str:
    """Where an erasure is: a folder, or a repository of the Hub.

    Args:
        source: Name of a folder below `models/erasures`, path of a folder, or `owner/name` of the Hub.

    Raises:
        ArtifactError: It is none of these.
    """
    source = source.strip()
    if not source:
        raise ArtifactError(
            "no erasure is named: give a folder below models/erasures, a path, or owner/name of the Hub"
        )
    if (below := found_in(ERASURES, source)) is not None:
        return below
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return path
    if REPOSITORY.fullmatch(source) and not is_local(source):
        return source
    raise ArtifactError(
        f"{source!r} is no folder below models/erasures, no path of a folder, and no owner/name of the Hub: put the "
        "folder that save_erasure wrote into models/erasures, and give its name"
    )


def stamp(source: str, revision: str) -> str:
    """A text that changes when an erasure does: with its files, or with the revision that is asked for."""
    place = erasure_at(source)
    if isinstance(place, str):
        return f"{place}@{revision}"
    known = hashlib.sha256(str(place).encode())
    for name in FILES:
        if os.path.isfile(place / name):
            facts = os.stat(place / name)
            known.update(f"{name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return known.hexdigest()


def load_erasure(source: str, revision: str) -> Erasure:
    """Read an erasure.

    Raises:
        ArtifactError: It is missing or damaged, or a folder is given a revision.
    """
    place, revision = erasure_at(source), revision.strip()
    if isinstance(place, str):
        return Erasure.load(place, revision=revision or None)
    if revision:
        raise ArtifactError(f"{source!r} is a folder here, which has no revision: leave it empty")
    return Erasure.read(place)


def model_at(source: str) -> str:
    """Where a model is that removes objects: below ComfyUI's folders, or what `erasure.load_pipeline` takes."""
    source = source.strip()
    if not source:
        raise ArtifactError(
            "no model is named: give a folder below models/diffusers, a file below models/checkpoints, a path, or "
            "owner/name of the Hub"
        )
    return next((str(place) for kind in MODELS if (place := found_in(kind, source)) is not None), source)
