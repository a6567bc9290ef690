"""The list of erasures in a pipeline's folder whose weights contain them.

The weights themselves do not show what was erased. So `erased.json` beside `model_index.json` lists it, and a model
card describes it. Stock loaders ignore both.
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
"""Config fields with digests of the base's tensors, which the saved model no longer has."""


@with_config(STRICT)
class BakedErasure(TypedDict):
    """One erasure that is part of the weights."""

    name: Name
    strength: Number
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Fingerprint of the erasure's tensors and options, as in results of evaluations."""
    config: dict[str, Any]
    """The erasure's `ErasureConfig`, without the digests of the base's tensors."""


@with_config(STRICT)
class Trace(TypedDict):
    """Contents of `erased.json`."""

    format_version: int
    date: NotRequired[Name]
    """Date when the folder was saved, in UTC."""
    versions: Annotated[dict[Name, Name], Field(max_length=100)]
    erasures: Annotated[list[BakedErasure], Field(min_length=1, max_length=1000)]
    """Erasures, in the order in which they were written into the weights."""


def has_trace(folder: str | Path) -> bool:
    """Whether a folder lists erasures in its weights."""
    return os.path.lexists(Path(folder) / TRACE_FILE)


def read_trace(folder: str | Path) -> list[tuple[BakedErasure, ErasureConfig]]:
    """Read the list of erasures in the weights of a pipeline's folder.

    Raises:
        ArtifactError: The file is missing, damaged or of a newer version.
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
    """Write the list of a pipeline's erasures in force into the folder that it will be saved to.

    Erasures that were in the weights when the model was loaded come first.

    Args:
        manager: Manager of the pipeline's erasures.
        folder: Folder to which the pipeline will be saved.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    folder = Path(folder)
    trace = trace_of(manager)
    entries = trace["erasures"]
    if not entries:
        # The saved model is the stock model, so an old list is removed.
        (folder / TRACE_FILE).unlink(missing_ok=True)
        return
    files.write_json(folder / TRACE_FILE, trace)
    # An existing card may be the user's own.
    if not os.path.lexists(folder / CARD_FILE):
        configs = [ErasureConfig.from_dict(entry["config"], TRACE_FILE) for entry in entries]
        files.write_text(folder / CARD_FILE, baked_card([entry["strength"] for entry in entries], configs))


def trace_of(manager: ErasureManager) -> Trace:
    """List the erasures in a pipeline's weights: those from before it was loaded, and those in force now.

    Args:
        manager: Manager of the pipeline's erasures.
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
    """Refuse a call of `save_pretrained` before its first file, or write the list of erasures beside its files.

    Args:
        manager: Manager of the pipeline's erasures.
        args: Positional arguments of the call.
        options: Keyword arguments of the call.

    Raises:
        AttachError: Stock files cannot contain the erasures in force.
        ArtifactError: The folder cannot be written.
    """
    manager.check_saveable()
    named = args[0] if args else options.get("save_directory")
    if isinstance(named, str | os.PathLike) and not Path(named).is_file():
        leave_trace(manager, named)
