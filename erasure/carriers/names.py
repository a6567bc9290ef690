"""Tensors of edits on disk: names `OWNER/KIND.FIELD`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from erasure.errors import ArtifactError


def grouped(
    tensors: Mapping[str, Tensor], kind: str, fields: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, list[Tensor]]:
    """Group tensors `OWNER/KIND.FIELD` by owner, in the order of the fields; optional fields may be missing.

    Raises:
        ArtifactError: A field is missing or unknown.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, separator, part = key.partition(f"/{kind}.")
        if separator:
            found.setdefault(owner, {})[part] = tensor
    for owner, parts in found.items():
        if not set(fields) - set(optional) <= set(parts) <= set(fields):
            raise ArtifactError(f"{kind} of {owner!r} are incomplete: expected {list(fields)}, found {sorted(parts)}")
    return {owner: [parts[part] for part in fields if part in parts] for owner, parts in found.items()}
