"""What suites on prompts are made of: data, and the small functions that turn it into rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from erasure.concept import key, singulars
from erasure.eval.detectors.choices import DetectorChoice
from erasure.eval.sources import PromptRow
from erasure.world import World

if TYPE_CHECKING:
    from erasure.eval.samples import Role

# No import of torch here: suites are listed without it.

Answers = Literal["flags", "classes", "none"]
"""How a suite's first detector answers: whether it flags an image, which class it sees, or nobody is asked."""
NO_PRESET = "modern"
"""Name of a suite's own choices."""


@dataclass(frozen=True)
class Preset:
    """Choices of a paper; what is `None` is as without a preset."""

    source: str
    """Where they are written down."""
    detectors: tuple[DetectorChoice, ...] = ()
    scheduler: str | None = None
    """Class of the scheduler."""
    steps: int | None = None
    guidance: float | None = None
    side: int | None = None
    per_row: tuple[Literal["guidance", "size"], ...] = ()
    """What is taken from each row of the list."""
    full: int | None = None
    """Images of the full size."""


@dataclass(frozen=True)
class SuiteData:
    """What a suite on prompts is made of."""

    title: str
    metrics: tuple[str, ...]
    sizes: Mapping[str, int]
    """Images of each size; the full size of a list is at most so many of its rows."""
    answers: Answers
    detectors: tuple[DetectorChoice, ...] = ()
    """In the order in which they answer; the first says what an image shows."""
    presets: Mapping[str, Preset] = field(default_factory=lambda: MappingProxyType({}))
    templates: tuple[str, ...] = ()
    """Own prompts, with {} for a name; none where a list must be given."""
    style_templates: tuple[str, ...] = ()
    """The same for a style."""
    names: tuple[str, ...] = ()
    """Names for the templates besides the concepts."""
    closed: bool = False
    """Whether the names are all that can be erased."""
    roles: Literal["target", "retain", "classes"] = "classes"
    """What rows of a list are that do not say so: targets, retained, or targets where they ask for a concept."""
    role: Role = "retain"
    """Role of rows that are no targets."""
    unsafe: bool = False
    """Whether images of target prompts may be unsafe to look at."""
    category: str = ""
    """Category of a list's rows that is drawn unless another is named."""
    quick_nudity: float | None = None
    """Rows of the quick size are those with more nudity than this, in per cent, where the list says so."""
    seen_at_least: float = 0.5
    """Least share of the stock model's images of a class on which the judge must see it, and of target prompts that a
    detector must flag."""
    of_concepts: bool = True
    tested_together: tuple[str, ...] = ()


def world_of_classes(objects: Sequence[str], styles: Sequence[str] = ()) -> World:
    """The world of some classes, each of which the singular of its name means too."""
    singular = {name: tuple(form for form in singulars(key(name)) if form != key(name)) for name in objects}
    return World(objects=tuple(objects), styles=tuple(styles), synonyms=singular)


def evenly(rows: Sequence[PromptRow], count: int) -> list[PromptRow]:
    """At most `count` rows, evenly over the list, its ends included."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / max(count - 1, 1))] for index in range(count)]


def cells(
    names: Sequence[str], templates: Sequence[str], count: int, role: str | None, start: int = 0
) -> list[PromptRow]:  # fmt: skip
    """`count` prompts of each name, from the templates in turn, numbered from `start` on."""
    return [
        PromptRow(
            templates[index % len(templates)].replace("{}", name), start + place * count + index,
            classes=(name,), role=role,
        )
        for place, name in enumerate(names) for index in range(count)
    ]  # fmt: skip
