"""Everything the package reads from and writes to disk: bounded, checked reading; atomic writing; safe names.

Readers trust nothing: kind of file, size, encoding, nesting, types and shapes are checked before anything is
allocated, and every fault is an `ErasureError`. Writers leave either the old or the new file, never a part of one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from erasure.files.folders import differences, digest, discard, has_recipe, held
from erasure.files.names import at_home, inside, is_line, shown, slug
from erasure.files.reading import read_bytes, read_json, read_lines, read_text, validated
from erasure.files.recognise import advice, is_checkpoint
from erasure.files.tables import lines_of, read_table, read_texts
from erasure.files.writing import (
    json_bytes,
    new_folder,
    replace_files,
    replacing,
    settled,
    steady,
    write_bytes,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from erasure.files.tensors import (
        TENSORS_LIMIT,
        TensorInfo,
        read_archive,
        read_metadata,
        read_tensors,
        tensor_infos,
    )

__all__ = [
    "TENSORS_LIMIT",
    "TensorInfo",
    "advice",
    "at_home",
    "differences",
    "digest",
    "discard",
    "has_recipe",
    "held",
    "inside",
    "is_checkpoint",
    "is_line",
    "json_bytes",
    "lines_of",
    "new_folder",
    "read_archive",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_metadata",
    "read_table",
    "read_tensors",
    "read_text",
    "read_texts",
    "replace_files",
    "replacing",
    "settled",
    "shown",
    "slug",
    "steady",
    "tensor_infos",
    "validated",
    "write_bytes",
    "write_json",
    "write_text",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """What reads tensors, on first use: it imports torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("erasure.files.tensors"), name)
