"""The embedded world: real, tiny models that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from erasure.assets.facts import FILE, CanvasFacts, read_facts
from erasure.errors import ArtifactError
from erasure.files import write_json

ROOT = Path(__file__).resolve().parent


def models() -> list[str]:
    """Names of the embedded pipelines."""
    return sorted(folder.parent.name for folder in ROOT.glob("canvas-*/model_index.json"))


def find(name: str) -> Path | None:
    """The folder of an embedded asset, or `None`."""
    folder = ROOT / name
    return folder if name.startswith("canvas-") and folder.is_dir() else None


def path(name: str) -> Path:
    """The folder of an embedded asset, for instance `canvas-sd`.

    Raises:
        ArtifactError: There is none of that name.
    """
    folder = find(name)
    if folder is None:
        present = ", ".join(sorted(item.name for item in ROOT.glob("canvas-*")))
        raise ArtifactError(f"no embedded asset {name!r}; there are: {present}")
    return folder


def facts_of(model: str | Path | None) -> CanvasFacts:
    """`canvas.json` of a model's folder or of an embedded model; empty for other models.

    Raises:
        ArtifactError: It is damaged.
    """
    # A pipeline that was put together from its parts came from nowhere.
    folder = (Path(model) if os.path.isdir(model) else find(str(model))) if model else None
    if folder is None:
        return {}
    own = read_facts(folder)
    if own is None and folder.resolve().is_relative_to(ROOT):
        own = read_facts(path("canvas-sd"))
    return own or {}


def copy_facts(model: str | Path | None, folder: str | Path) -> None:
    """Write the `canvas.json` of a model beside a copy of it, so that the copy declares the same world.

    Nothing is written for a model that has none.

    Args:
        model: A model's folder, or the name of an embedded one.
        folder: The copy's folder.

    Raises:
        ArtifactError: The file is damaged, or cannot be written.
    """
    facts = facts_of(model)
    if facts:
        write_json(Path(folder) / FILE, facts)


def canvas(model: str | Path = "canvas-sd") -> CanvasFacts:
    """`canvas.json` of an embedded model: its objects, styles, backgrounds, templates and training record.

    Args:
        model: Name of an embedded model, or a folder.

    Raises:
        ArtifactError: The model has none, so it is not of the embedded world, or it is damaged.
    """
    folder = Path(model) if os.path.isdir(model) else path(str(model))
    facts = read_facts(folder)
    if facts is None:
        raise ArtifactError(f"{folder} has no canvas.json: it is not a model of the embedded world")
    return facts
