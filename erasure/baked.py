"""The trace that erasures leave in a pipeline's folder when they are saved as part of its weights.

Nothing in the weights tells what was taken out of them. So `erased.json` beside `model_index.json` says it, and a
model card for people. Stock loaders pass over both.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from erasure import files
from erasure.cards import baked_card
from erasure.errors import ArtifactError
from erasure.interop.pipelines import origin
from erasure.schema import FORMAT_VERSION, STRICT, ErasureConfig, Name, Number
from erasure.versions import library_versions

if TYPE_CHECKING:
    from erasure.attach import ErasureManager

TRACE_FILE, CARD_FILE, INDEX_FILE = "erased.json", "README.md", "model_index.json"
LEFT_OUT = ("tensors", "text_encoders")
"""Digests of the base's tensors, which the saved model no longer has."""


@with_config(STRICT)
class BakedErasure(TypedDict):
    """One erasure that is part of the weights."""

    name: Name
    strength: Number
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Fingerprint of its tensors and options, as results of evaluations have it."""
    config: dict[str, Any]
    """Its `ErasureConfig`, without the digests of the base's tensors."""


@with_config(STRICT)
class Trace(TypedDict):
    """`erased.json`."""

    format_version: int
    date: NotRequired[Name]
    """When the folder was saved, in UTC."""
    versions: Annotated[dict[Name, Name], Field(max_length=100)]
    erasures: Annotated[list[BakedErasure], Field(min_length=1, max_length=1000)]
    """In the order in which they were put in."""


def has_trace(folder: str | Path) -> bool:
    """Whether a folder says that erasures are part of its weights."""
    return os.path.lexists(Path(folder) / TRACE_FILE)


def read_trace(folder: str | Path) -> list[tuple[BakedErasure, ErasureConfig]]:
    """Read what is erased in the weights of a pipeline's folder.

    Raises:
        ArtifactError: It does not say, or the file is damaged or of a newer version.
    """
    path = Path(folder) / TRACE_FILE
    data: dict[str, Any] = files.read_json(path, dict[str, Any])
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this erasure package reads up to {FORMAT_VERSION}: "
            "pip install --upgrade erasure-diffusers"
        )
    trace: Trace = files.validated(data, Trace, str(path))
    return [
        (entry, ErasureConfig.from_dict(entry["config"], f"{path}, erasure {number}"))
        for number, entry in enumerate(trace["erasures"], 1)
    ]


def leave_trace(manager: ErasureManager, folder: str | os.PathLike[str]) -> None:
    """Write what is in force on a pipeline into the folder that it is about to be saved to.

    What the model had been erased of when it was loaded, according to the trace where it came from, comes first.

    Args:
        manager: Of the pipeline.
        folder: Where it will be saved.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    folder = Path(folder)
    trace = trace_of(manager)
    entries = trace["erasures"]
    if not entries:
        # What is saved here now is the stock model.
        (folder / TRACE_FILE).unlink(missing_ok=True)
        return
    files.write_json(folder / TRACE_FILE, trace)
    # A card that is there already may be somebody's own.
    if not os.path.lexists(folder / CARD_FILE):
        configs = [ErasureConfig.from_dict(entry["config"], TRACE_FILE) for entry in entries]
        files.write_text(folder / CARD_FILE, baked_card([entry["strength"] for entry in entries], configs))


def trace_of(manager: ErasureManager) -> Trace:
    """What is erased in the weights of a pipeline: before it was loaded, and by what is in force now.

    Args:
        manager: Of the pipeline.
    """
    erasures, strengths = manager.erasures, manager.strengths
    names = [name for name in erasures if name in {*manager.active_erasures(), *manager.fused_erasures}]
    entries = _earlier(manager) + [
        BakedErasure(
            name=name, strength=strengths[name], fingerprint=erasures[name].fingerprint,
            config=_config(erasures[name].config),
        )
        for name in names
    ]  # fmt: skip
    return Trace(
        format_version=FORMAT_VERSION, date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(), erasures=entries,
    )  # fmt: skip


def _earlier(manager: ErasureManager) -> list[BakedErasure]:
    source = origin(manager.pipe)[0]
    if not source or not has_trace(source):
        return []
    try:
        return [entry for entry, _ in read_trace(source)]
    except ArtifactError as error:
        warnings.warn(f"what {source} was erased of before is not written down: {error}", stacklevel=2)
        return []


def _config(config: ErasureConfig) -> dict[str, Any]:
    base = {key: value for key, value in config.base.items() if key not in LEFT_OUT}
    return dataclasses.asdict(dataclasses.replace(config, base=base))


def before_saving(manager: ErasureManager, args: Sequence[object], options: dict[str, object]) -> None:
    """Refuse a call of `save_pretrained` ahead of its first file, or say beside its files what they are erased of.

    Args:
        manager: Of the pipeline.
        args: Positional arguments of the call.
        options: Keyword arguments of the call.

    Raises:
        AttachError: Stock files cannot hold what is in force.
        ArtifactError: The folder cannot be written.
    """
    manager.check_saveable()
    named = args[0] if args else options.get("save_directory")
    if isinstance(named, str | os.PathLike) and not Path(named).is_file():
        leave_trace(manager, named)
