"""Suites: what to generate, and how to score it. One module each, found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard, TypeVar

from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval.rows import Record, Rows
from erasure.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from erasure.eval.controls import Control
    from erasure.eval.metrics.clip_score import ClipModel
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


Drawn: TypeAlias = "tuple[list[Sample], list[Image.Image]]"
"""A batch of samples and their images."""


class Suite(Protocol):
    """What a suite module registers."""

    title: str
    """One line for lists."""

    def plan(self, pipe: Pipeline, concepts: Sequence[str | Concept], size: str, seed: int) -> Plan:
        """Expand to samples. Raises EvaluationError when the suite has no such concept or size."""
        ...

    def judge(self) -> Judge:
        """The detector that the suite is scored with."""
        ...

    def score(self, plan: Plan, rows: Rows) -> list[Record]:
        """Metric rows from result rows."""
        ...


class ComparingSuite(Suite, Protocol):
    """A suite that compares ways to draw with one model, instead of a model before and after erasures.

    Erasures that are attached stay in force throughout.
    """

    variants: tuple[str, ...]
    """The ways, the one that the others are compared with first."""

    def draw(self, pipe: Pipeline, variant: str, samples: Sequence[Sample], batch_size: int) -> Iterator[Drawn]:
        """Draw samples in one of the ways, batch by batch."""
        ...

    # A suite in which a bare background may be what is asked for has a method `plain(sample, image) -> bool` besides,
    # that tells such an image from those that show nothing.

    def controls(self, stock: Pipeline, judge: Judge, plan: Plan) -> list[Control]:
        """Give what must hold of the stock model and the judge; where one control fails, no number is given."""
        ...

    def measure(self, sample: Sample, image: Image.Image) -> Record:
        """What is known of an image besides the judge's answer; goes into its row as `measured`."""
        ...

    def compare(
        self, plan: Plan, rows: Rows, features: Mapping[tuple[str, str], np.ndarray], clip: ClipModel | None
    ) -> list[Record]:
        """Metric rows from result rows, image features by sample and variant, and the CLIP model if there is one."""
        ...


def is_comparing(suite: Suite) -> TypeGuard[ComparingSuite]:
    """Whether a suite compares ways to draw."""
    return hasattr(suite, "variants")


def _refusal(thing: object) -> str:
    """Say what keeps a thing from being a suite; empty where nothing does."""
    missing = [name for name in ("title", "plan", "judge", "score") if not hasattr(thing, name)]
    return f"it lacks {', '.join(missing)}" if missing else ""


SUITES: Registry[Suite] = Registry(
    "suite",
    {
        "canvas": "erasure.eval.suites.canvas",
        "canvas-unseen": "erasure.eval.suites.canvas",
        "composition": "erasure.eval.suites.composition",
        "removal": "erasure.eval.suites.removal",
    },
    told=("title",),
    accepts=_refusal,
    unknown=EvaluationError,
)

S = TypeVar("S", bound=type)


def register(name: str) -> Callable[[S], S]:
    """Class decorator: make a suite known under a name.

    Packages of others may instead name an instance in the entry-point group `erasure.suites`.
    """

    def add(suite: S) -> S:
        SUITES.add(name, suite())
        return suite

    return add


def available() -> tuple[str, ...]:
    """Names of all suites."""
    return SUITES.names()


def get(name: str) -> Suite:
    """The suite of a name.

    Raises:
        EvaluationError: There is none; the message names the nearest.
        BrokenPluginError: Another package names it, and it cannot be loaded.
    """
    return SUITES.get(name)
