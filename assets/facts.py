"""`canvas.json`: what a model of the embedded world says of itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from erasure.files import read_json

FILE = "canvas.json"
OPEN = ConfigDict(extra="allow")
"""The record of a training, and what later versions add."""
Word = Annotated[str, Field(min_length=1, max_length=200)]
Words = Annotated[list[Word], Field(max_length=500)]
Side = Annotated[int, Field(ge=8, le=8_192)]


@with_config(OPEN)
class Generation(TypedDict, total=False):
    """How images of the model are drawn where a call does not say otherwise."""

    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)]
    guidance_scale: Annotated[float, Field(ge=0, le=1_000)]
    height: Side
    width: Side


@with_config(OPEN)
class CanvasFacts(TypedDict, total=False):
    """What a model declares of its world: classes, how prompts name them, and how images are drawn."""

    objects: Annotated[Words, Field(min_length=1)]
    styles: Annotated[Words, Field(min_length=1)]
    backgrounds: Words
    templates: Words
    held_out_templates: Words
    unsafe: Words
    groups: dict[Word, Word | Words]
    """Group of each object, or objects of each group."""
    synonyms: dict[Word, Words]
    anchors: dict[Word, Word]
    retain: dict[Word, Words]
    """Concepts that must survive the erasure of an object or style."""
    generation: Generation
    ip_adapter: Word
    """Name of an embedded IP-Adapter for the model, or the folder of another."""


def read_facts(folder: str | Path) -> CanvasFacts | None:
    """`canvas.json` of a model's folder; `None` when it has none.

    Raises:
        ArtifactError: It cannot be read, or is something else.
    """
    path = Path(folder) / FILE
    # Unlike `Path.exists`, this gives no error for names that cannot be.
    if not os.path.lexists(path):
        return None
    facts: CanvasFacts = read_json(path, CanvasFacts)
    return facts
