"""Suites: what to generate, and how to score it. One module each, found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval.detectors.base import NamedDetector
from erasure.eval.detectors.choices import made, read_choices
from erasure.eval.inputs import Inputs
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

FLAG_METRICS = (
    "flagged_rate", "new_flags", "labels", "face_rate", "person_rate", "agreement", "control_flagged",
)  # fmt: skip
"""Metrics of any detectors that a suite is given."""
OF_PROMPTS = ("artists", "celebrities", "coco", "i2p", "imagenette", "nudity-benign", "prompts", "unlearncanvas")
"""Suites on prompts for people's own models, see `erasure.eval.suites.prompts`."""


@dataclass(frozen=True)
class Target:
    """A concept to erase, in the words of a suite."""

    name: str
    """As the user gave it."""
    domain: str
    """`object` or `style`: which classifier is asked."""
    members: tuple[str, ...]
    """The classes of the suite that it stands for: one, or those of a group."""

    @property
    def is_flagged(self) -> bool:
        """Whether it has no class, because a detector only says whether an image shows it."""
        from erasure.eval.detectors.judging import FLAGGED

        return self.members == (FLAGGED,)

    @property
    def words(self) -> tuple[str, ...]:
        """Words for it in prompts: its classes, or its own name where it has none."""
        return (self.name,) if self.is_flagged else self.members


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
    groups: tuple[tuple[str, ...], ...] = ()
    """Objects that are alike, group by group; none where the suite groups nothing."""

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
    detectors: Mapping[str, NamedDetector] = MappingProxyType({})
    """Detectors that look at every image, by the label of their findings."""
    flagged_at_least: float = 0.75
    """Least share of the stock model's images of target prompts that a detector must flag for its rates to mean
    anything."""

    def prepared(self, inputs: Inputs, pipe: Pipeline, concepts: Sequence[str | Concept]) -> Suite:
        """Give the suite with what a caller gives: here with detectors, whose rates come behind its own metrics.

        Args:
            inputs: What is given.
            pipe: The model.
            concepts: What is erased.

        Raises:
            EvaluationError: Something is given that the suite has no use for.
        """
        if other := [name for name in inputs.named() if name not in ("detectors", "clip")]:
            raise EvaluationError(
                f"suite {self.name} takes no {', '.join(other)}: its prompts and the way they are drawn are fixed; "
                "suites that take them are " + ", ".join(OF_PROMPTS)
            )
        if inputs.detectors is None:
            return self
        suite = copy(self)
        suite.detectors = made(read_choices(inputs.detectors))
        suite.metrics = (*self.metrics, *(name for name in FLAG_METRICS if name not in self.metrics))
        return suite

    @property
    def flagging(self) -> tuple[str, ...]:
        """Labels of the detectors whose flags are counted; others only say which class an image shows."""
        return tuple(self.detectors)

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
        **dict.fromkeys(OF_PROMPTS, "erasure.eval.suites.published"),
        "canvas": "erasure.eval.suites.canvas",
        "canvas-unseen": "erasure.eval.suites.canvas",
        "composition": "erasure.eval.suites.composition",
        "removal": "erasure.eval.suites.removal",
    },
    attributes=("title", "metrics", "of_concepts"),
    accepts=_refusal,
    unknown=EvaluationError,
    instances=True,
)

register, available, get = SUITES.register, SUITES.names, SUITES.get
