"""Variants of weights (`fp16`): how diffusers and transformers name a component's files on disk."""

from __future__ import annotations

import re
from pathlib import Path

from erasure.errors import ArtifactError
from erasure.files import shown

PART = r"(-\d+-of-\d+)?"
"""Number of a file among those that hold one component's weights: behind the variant in the file's name, and ahead of
it in names that older versions wrote."""
WEIGHTS = re.compile(rf"(diffusion_pytorch_)?model{PART}(\.(?P<variant>[A-Za-z]\w*))?{PART}\.safetensors")
"""Names of a component's files of weights, whole or in parts: `model.fp16-00001-of-00002.safetensors`."""


def only_variant(folder: str | Path) -> str | None:
    """Name the one variant in which some components of a model are stored, where these have no usual weights.

    diffusers looks for the usual weights unless it is told a variant, and then takes the usual ones of components that
    lack it.

    Args:
        folder: Folder of the model. Of a Hub id nothing is known.

    Returns:
        The variant; `None` for the usual weights, and where no variant would do.

    Raises:
        ArtifactError: Several variants would do.
    """
    variants: dict[str, set[str]] = {}
    for path in Path(folder).glob("*/*"):
        if named := WEIGHTS.fullmatch(path.name):
            variants.setdefault(path.parent.name, set()).add(named["variant"] or "")
    without_usual = [found for found in variants.values() if "" not in found]
    shared = set.intersection(*without_usual) if without_usual else set()
    if len(shared) > 1:
        names = sorted(shared)
        raise ArtifactError(
            f"{shown(str(folder), 200)} has weights in the variants {' and '.join(names)} and no usual ones: choose "
            f"one with erasure.load_pipeline(FOLDER, variant={names[0]!r}). For commands save the chosen one by "
            ".save_pretrained(OTHER), and name OTHER as --model"
        )
    return shared.pop() if shared else None
