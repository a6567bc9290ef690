"""Suites: what to generate, and how to score it. One module each, found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval.rows import Record, Rows
from erasure.eval.variants import AFTER, BEFORE, Variant
from erasure.registry import Registry

if TYPE_CHECKING:
    from PIL import Image

    from erasure.eval.controls import Control
    from erasure.eval.samples import Sample
    from erasure.eval.scoring import Judge
    from erasure.interop.protocols import Pipeline

# No import of torch here: the command line lists suites without it.

SIZES = ("smoke", "quick", "full")
"""`smoke`: does it run. `quick`: minutes on a laptop. `full`: the numbers to publish."""


@dataclass(frozen=True)
class Target:
    """A concept to erase, in the words of a suite."""

    name: str
    """As the user gave it."""
    domain: str
    """`object` or `style`: which classifier is asked."""
    members: tuple[str, ...]
    """The classes of the suite that it stands for: one, or those of a group."""


@dataclass(frozen=True)
class Plan:
    """A suite expanded for some targets, a size and a seed."""

    suite: str
    size: str
    seed: int
    targets: tuple[Target, ...]
    samples: tuple[Sample, ...]
    recipe: Record = field(default_factory=dict)
    """What a reader must know to compare numbers; the same for every target, so that tables can hold several."""

    unsafe: tuple[str, ...] = ()
    """Objects of the unsafe group, which nothing should be turned into; none where the suite has no such group."""

    @property
    def concept(self) -> str | None:
        """Label of all targets together."""
        return ", ".join(target.name for target in self.targets) or None


class Suite(ABC):
    """What is drawn, in which variants, who looks at it and what is computed: subclass it and register it.

    It is registered as an instance, made without arguments. Most of it is data; what is left is how a concept becomes
    samples.
    """

    name: str = ""
    """Name in results; `register` sets it."""
    title: str = ""
    """One line for lists."""
    variants: tuple[Variant, ...] = (BEFORE, AFTER)
    """The ways to draw, the one that the others are compared with first."""
    metrics: tuple[str, ...] = ()
    """Names of the metrics that are computed, in the order of results."""
    tested_together: tuple[str, ...] = ()
    """Metrics whose paired tests are read together, so that their p-values are adjusted."""
    of_concepts: bool = True
    """Whether it measures what became of concepts, so that some must be named and can be attacked; otherwise it
    compares ways to draw with whatever is in force."""
    strict_controls: bool = False
    """Whether one control that fails withholds every number; otherwise metrics ask for the controls they need."""

    @abstractmethod
    def plan(self, pipe: Pipeline, concepts: Sequence[str | Concept], size: str, seed: int) -> Plan:
        """Expand to samples. Raises EvaluationError when the suite has no such concept or size."""

    @abstractmethod
    def judge(self) -> Judge:
        """The detector that answers which thing and which style an image shows."""

    @abstractmethod
    def controls(self, stock: Pipeline, judge: Judge, plan: Plan, rows: Rows) -> Sequence[Control]:
        """Give what must hold of the stock model and the judge for numbers to mean anything.

        Args:
            stock: The model without erasures.
            judge: The detector.
            plan: What was drawn.
            rows: Result rows by variant.
        """

    def plain(self, sample: Sample, image: Image.Image) -> bool:
        """Whether an image of one colour is what was asked for, a bare background for instance."""
        return False

    def measure(self, sample: Sample, image: Image.Image) -> Record:
        """What is known of an image besides the answers of detectors; goes into its row as `measured`."""
        return {}

    def variant_names(self) -> tuple[str, ...]:
        """Names of the ways to draw."""
        return tuple(variant.name for variant in self.variants)


def _refusal(thing: object) -> str:
    """Say what keeps a thing from being a suite; empty where nothing does."""
    if not isinstance(thing, Suite):
        return "it is no instance of a subclass of erasure.eval.suites.Suite"
    missing = [name for name in ("title", "variants", "metrics") if not getattr(thing, name)]
    return f"it has no {', '.join(missing)}" if missing else ""


SUITES: Registry[Suite] = Registry(
    "suite",
    {
        "canvas": "erasure.eval.suites.canvas",
        "canvas-unseen": "erasure.eval.suites.canvas",
        "composition": "erasure.eval.suites.composition",
        "removal": "erasure.eval.suites.removal",
    },
    told=("title", "metrics", "of_concepts"),
    accepts=_refusal,
    unknown=EvaluationError,
    instances=True,
)

register, available, get = SUITES.register, SUITES.names, SUITES.get
