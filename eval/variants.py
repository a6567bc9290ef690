"""Ways in which every sample of a suite is drawn: before and after erasures, or by one method and another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

    from erasure.eval.samples import Sample
    from erasure.interop.protocols import Pipeline

# No import of torch here: suites are listed without it.

Drawn: TypeAlias = "tuple[list[Sample], list[Image.Image]]"
"""A batch of samples and their images."""
Draw: TypeAlias = "Callable[[Pipeline, Sequence[Sample], int], Iterator[Drawn]]"
"""Draws samples with a pipeline, so many at once, batch by batch."""


@dataclass(frozen=True)
class Variant:
    """A way to draw samples."""

    name: str
    """In rows and results, and of the folder of its images."""
    draw: Draw | None = None
    """How; by an ordinary call of the pipeline when left out."""
    erased: bool = True
    """Whether erasures that are attached are in force, or the stock model draws."""
    only_erased: bool = False
    """Whether there is nothing to draw where no erasure is attached."""
    moved_from: str | None = None
    """Variant that images are held against pixel by pixel: how far has each of them moved?"""


BEFORE = Variant("before", erased=False)
"""The stock model."""
AFTER = Variant("after", only_erased=True, moved_from=BEFORE.name)
"""The model with its erasures in force."""
