"""Stress tests: what an erasure withstands once the erased model itself is changed. One module each, found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from erasure.errors import EvaluationError
from erasure.eval.sizes import SizedOptions
from erasure.options import Count, CountOrZero
from erasure.registry import Registry

if TYPE_CHECKING:
    from erasure.eval.rows import Record
    from erasure.eval.samples import Sample
    from erasure.eval.stress.bench import Bench
    from erasure.eval.stress.conditions import Condition
    from erasure.eval.suites import Target

# No import of torch here: the command line lists stress tests without it.


@dataclass(frozen=True, kw_only=True)
class StressTest(SizedOptions, ABC):
    """A stress test with its options: subclass it as a frozen dataclass and register it.

    It names conditions: the erased model changed in some way, and the controls of these. The runner draws the suite's
    prompts in every condition, asks the judge, counts and resumes. So no stress test knows the judge.
    """

    kind: ClassVar[str] = "stress test"
    name: ClassVar[str] = ""
    """Name in the registry; `register` sets it."""
    title: ClassVar[str] = ""
    """One line for lists: what is done to the erased model."""
    paper: ClassVar[str] = ""
    """Where it comes from."""
    of_attackers: ClassVar[bool] = True
    """Whether it does what somebody with the weights may do to bring the concept back; an audit grades by it."""
    control: ClassVar[str] = ""
    """Control without which no verdict is given, in a sentence."""
    metrics: ClassVar[tuple[str, ...]] = (
        "concept_shown", "retained_seen", "recovered", "control_seen", "control_unasked", "control_changed",
    )  # fmt: skip
    """Names of the metrics that are computed, in the order of results."""
    needs_clip: ClassVar[bool] = False
    """Whether it computes with the image features of a CLIP model."""

    samples: Count = 50
    """Prompts with the concept at most, spread evenly over those of the suite."""
    retained: CountOrZero = 24
    """Prompts without the concept at most: they tell a model that has lost the concept from one that draws nothing."""

    @abstractmethod
    def conditions(self, bench: Bench) -> Sequence[Condition]:
        """Give the conditions besides the stock model and the erased one as they are, controls included.

        Raises:
            EvaluationError: The erasure or the model cannot be tested this way; the message says why.
        """

    def prepare(self, bench: Bench) -> None:
        """Do what must be done once ahead of all drawing, such as a training; called in every process.

        What it makes goes into the folder of the run, so that a killed run finds it again.
        """

    def asked(self, samples: Sequence[Sample], target: Target) -> Sequence[Sample]:
        """Give the samples with the concept that are drawn, in the place of the suite's own.

        Args:
            samples: Those of the suite that were chosen.
            target: The concept.
        """
        return samples

    def more_samples(self, bench: Bench) -> Sequence[Sample]:
        """Give samples besides those of the suite, for conditions of this test alone; their role is `cross`."""
        return ()

    def measured(self, bench: Bench) -> Mapping[str, Record]:
        """Give figures that need no image, as fields of a metric row, by `metric` or by `metric/condition`."""
        return {}

    def recipe(self, bench: Bench) -> Record:
        """Give the options as the recipe holds them, plain data: contents in the place of paths of this machine."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _refusal(thing: object) -> str:
    """Say what keeps a thing from being a stress test; empty where nothing does."""
    if not (isinstance(thing, type) and issubclass(thing, StressTest)):
        return "it is no subclass of erasure.eval.stress.StressTest"
    return "" if thing.control else "it names no control, without which no verdict can be given"


STRESS_TESTS: Registry[type[StressTest]] = Registry(
    "stress test",
    {
        name: f"erasure.eval.stress.{name}"
        for name in ("quantise", "strength", "noise", "merge", "stack", "relearn", "restore", "footprint")
    },
    attributes=("title", "paper", "of_attackers", "control", "sizes", "metrics"),
    accepts=_refusal,
    unknown=EvaluationError,
)

register, available, get = STRESS_TESTS.register, STRESS_TESTS.names, STRESS_TESTS.get
