"""Metric rows of suites that compare ways to draw: every one against the first, on the same noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from erasure.errors import EvaluationError
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import SHARE, Metric, Need
from erasure.eval.metrics.outcomes import collect, paired, rate_row
from erasure.eval.metrics.utility import sample_mean
from erasure.eval.rows import Record, Row, shows_nothing
from erasure.eval.statistics import paired_bootstrap
from erasure.eval.suites import Plan, Rows


def rates(
    name: str, definition: str, plan: Plan, rows: Rows, hit: Callable[[Row], bool | None], against: str | None = None
) -> list[Record]:
    """The rate of a yes-or-no outcome in every variant, with McNemar's exact test against one of them.

    Args:
        name: Of the metric.
        definition: For its recipe.
        plan: Samples and recipe.
        rows: Result rows by variant.
        hit: The outcome of a row; `None` when its detection failed.
        against: The variant to compare with; the first when left out.
    """

    def outcome(row: Row) -> bool | None:
        return None if shows_nothing(row) else hit(row)

    outcomes = {v: collect([(row, row["sample_id"], outcome(row)) for row in table]) for v, table in rows.items()}
    reference = against or next(iter(rows))
    found = []
    for variant, each in outcomes.items():
        row = rate_row(name, plan.concept, variant, each, {**plan.recipe, "metric": definition})
        if variant != reference and reference in outcomes and row["value"] is not None:
            row |= {"against": reference, **paired(outcomes[reference], each)}
        found.append(row)
    return found


def means(name: str, definition: str, plan: Plan, rows: Rows, value: Callable[[Row], float | None]) -> list[Record]:
    """The mean of a number in every variant, with its paired change against the first; intervals draw prompts.

    Arguments as in `rates`.
    """

    def measured(row: Row) -> float | None:
        return None if shows_nothing(row) else value(row)

    reference = next(iter(rows))
    first = {row["sample_id"]: measured(row) for row in rows[reference]}
    found = []
    for variant, table in rows.items():
        row: Record = {"name": name, "concept": plan.concept, "variant": variant}
        try:
            row |= sample_mean(table, measured, plan.seed)
        except EvaluationError as error:
            row |= {"value": None, "low": None, "high": None, "n": 0, "reason": str(error)}
        pairs = [(first.get(each["sample_id"]), measured(each), each["prompt"]) for each in table]
        both = [(old, new, prompt) for old, new, prompt in pairs if old is not None and new is not None]
        if both and variant != reference and row["value"] is not None:
            old, new, prompts = zip(*both, strict=True)
            change = paired_bootstrap(old, new, clusters=prompts, seed=plan.seed)
            row |= {"against": reference, "change": change._asdict()}
        found.append(row | {"recipe": {**plan.recipe, "metric": definition}})
    return found


class ComparedRate(Metric):
    """The rate of a yes-or-no outcome in every way to draw, each against one of them."""

    bounds = SHARE
    unit = "%"
    needs = ("judge",)
    against: ClassVar[str | None] = None
    """The way to compare with; the first when left out."""

    @abstractmethod
    def hit(self, row: Row) -> bool | None:
        """The outcome of a row; `None` when its detection failed."""

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `rates`."""
        return rates(self.name, self.definition, evidence.plan, evidence.rows, self.hit, self.against)


class ComparedMean(Metric):
    """The mean of a number in every way to draw, each against the first."""

    @abstractmethod
    def values(self, evidence: Evidence) -> Callable[[Row], float | None]:
        """What gives the number of a row."""

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `means`."""
        return means(self.name, self.definition, evidence.plan, evidence.rows, self.values(evidence))


class ComparedLikeness(ComparedMean):
    """The mean of a cosine of CLIP features, which there is with a CLIP model only."""

    bounds = (-1.0, 1.0)
    higher_is_better = True
    needs: ClassVar[tuple[Need, ...]] = ("clip",)

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `means`; nothing without a CLIP model."""
        return [] if evidence.clip is None else super().compute(evidence)
