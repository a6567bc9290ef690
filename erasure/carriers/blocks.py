"""Edits of blocks' outputs: their names on disk, and checks of their tensors."""

from __future__ import annotations

import torch

from erasure.carriers.features import BlockEdit, FeatureEdit
from erasure.carriers.reconstruction import ReconstructionEdit
from erasure.errors import ArtifactError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Allowed types of tensors that are not whole numbers."""
KINDS: dict[type[FeatureEdit] | type[ReconstructionEdit], str] = {
    FeatureEdit: "features",
    ReconstructionEdit: "reconstruction",
}
"""Names of the kinds of block edits on disk."""
WHOLE = {"edits", "votes", "rule", "local", "first", "end", "k"}
"""Fields of block edits that are whole numbers."""
SWITCHES = {"rule", "local"}
"""Fields of block edits that are 0 or 1."""


def check_block(key: str, edit: BlockEdit) -> None:
    """Raise `ArtifactError` unless the tensors of a block's edit are consistent and valid."""
    kind = KINDS[type(edit)]
    for name, tensor in edit._asdict().items():
        allowed = (torch.int64,) if name in WHOLE else FLOATS
        if tensor.dtype not in allowed:
            raise ArtifactError(f"the {kind} of {key!r} do not fit together: {name} is {tensor.dtype}; make it again")
    if not edit.fits():
        raise ArtifactError(f"the {kind} of {key!r} do not fit together: make the erasure again")
    for name, tensor in edit._asdict().items():
        if name not in WHOLE or tensor.ndim:
            continue
        last = 1 if name in SWITCHES else 2**31 - 1
        if not 0 <= int(tensor) <= last:
            raise ArtifactError(f"the {kind} of {key!r}: {name} is {int(tensor)}, allowed: 0 to {last}")


def acts(edit: BlockEdit) -> bool:
    """Whether an edit of a block changes anything where its gate is open."""
    if isinstance(edit, ReconstructionEdit):
        return bool((edit.factor != 1).any()) and bool(edit.w_dec.any())
    if len(edit.filler):
        return edit.gate.numel() > 0
    used = edit.edits[1]
    return bool(((edit.gain[used] != 0) | (edit.offset[used] != 0)).any()) and bool(edit.w_dec[used].any())
