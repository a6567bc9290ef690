"""Yes-or-no outcomes of images: what the judge sees, counted and compared, with what is missing kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erasure.eval.rows import Record, Row, judged_of, metric_of
from erasure.eval.statistics import Interval, holm, mcnemar_exact, too_many_missing, transitions, weighted_rate
from erasure.eval.suites import Target

OTHER = {"object": "style", "style": "object"}
"""The domain that a target's domain is crossed with."""


@dataclass(frozen=True)
class Outcomes:
    """Yes-or-no outcomes of one rate."""

    hits: tuple[bool, ...]
    weights: tuple[float, ...]
    prompts: tuple[str, ...]
    """Cluster of every outcome."""
    keys: tuple[str, ...]
    """Key of every outcome, which pairs one before with one after."""
    lost: tuple[float, ...] = ()
    """Weights of the outcomes that are missing; they are in no other field."""

    @property
    def missing(self) -> int:
        """Number of outcomes that are missing."""
        return len(self.lost)

    def refusal(self) -> str | None:
        """Why no rate is given: too many outcomes are missing."""
        return too_many_missing(sum(self.lost), sum(self.weights) + sum(self.lost))

    def worst(self, counted_as: bool) -> Interval:
        """The rate with every missing outcome counted as given."""
        return weighted_rate([*self.hits, *[counted_as] * self.missing], [*self.weights, *self.lost])

    def rate(self) -> float:
        """Weighted share of hits."""
        return float(np.average(np.asarray(self.hits, dtype=np.float64), weights=self.weights))


def expected(row: Row, domain: str) -> str | None:
    """Give the class that the prompt of a row asks for in a domain."""
    if domain == "style":
        return row.get("style")
    objects = row.get("objects") or []
    return objects[0] if objects else None


def holds(row: Row, targets: Sequence[Target]) -> list[Target]:
    """The targets that the prompt of a row holds."""
    return [target for target in targets if expected(row, target.domain) in target.members]


def answer_of(row: Row, head: str) -> str | None:
    """Give the class that a head of the judge (`object`, `style` or `shape`) sees; `None` when there is no answer."""
    judged = judged_of(row)
    return None if judged is None else judged.get(head)


def correct(row: Row, domain: str, head: str | None = None) -> bool | None:
    """Whether a head sees what the prompt asked for; `None` when there is no answer."""
    answer = answer_of(row, head or domain)
    return None if answer is None else answer == expected(row, domain)


def shows(row: Row, target: Target, head: str | None = None) -> bool | None:
    """Whether a head sees a target, or any member of its group; `None` when there is no answer."""
    answer = answer_of(row, head or target.domain)
    return None if answer is None else answer in target.members


def collect(items: Sequence[tuple[Row, str, bool | None]]) -> Outcomes:
    """Outcomes of rows with their keys; `None` counts as missing."""
    seen = [(row, key, hit) for row, key, hit in items if hit is not None]
    return Outcomes(
        hits=tuple(hit for _, _, hit in seen),
        weights=tuple(float(row.get("weight", 1.0)) for row, _, _ in seen),
        prompts=tuple(row["prompt"] for row, _, _ in seen),
        keys=tuple(key for _, key, _ in seen),
        lost=tuple(float(row.get("weight", 1.0)) for row, _, hit in items if hit is None),
    )


def rate_row(
    name: str, concept: str | None, variant: str, outcomes: Outcomes, recipe: Record, *,
    missing_as: bool = False, withheld: str | None = None,
) -> Record:  # fmt: skip
    """A metric row of a rate, with its Wilson interval; without a value where none can be given, and then with why.

    Args:
        name: Name of the metric.
        concept: Label of what was erased.
        variant: Label of the model or of the way to draw.
        outcomes: What is counted.
        recipe: What the number depends on.
        missing_as: The outcome that speaks against the erasure; missing ones count as it in `worst`.
        withheld: Why the rate is not given whatever the outcomes are, if it is not.
    """
    row: Record = {"name": name, "concept": concept, "variant": variant}
    reason = withheld or outcomes.refusal()
    if reason is None:
        interval = weighted_rate(outcomes.hits, outcomes.weights)
        row |= {**interval._asdict(), "n": len(outcomes.hits), "interval": "wilson"}
    else:
        row |= {"value": None, "low": None, "high": None, "n": len(outcomes.hits), "reason": reason}
    if outcomes.missing:
        row["missing"] = outcomes.missing
    if withheld is None and (outcomes.hits or outcomes.lost):
        row["worst"] = outcomes.worst(missing_as)._asdict()
    return row | {"recipe": recipe}


def paired(before: Outcomes, after: Outcomes) -> Record:
    """Compare outcomes pair by pair: how many changed, and McNemar's exact test."""
    first = dict(zip(before.keys, before.hits, strict=True))
    second = dict(zip(after.keys, after.hits, strict=True))
    shared = [key for key in first if key in second]
    table = transitions([first[key] for key in shared], [second[key] for key in shared])
    return {"transitions": table, "mcnemar_p": mcnemar_exact(table["before_only"], table["after_only"])}


def adjust(rows: Sequence[Record], names: Sequence[str], concept: str | None) -> None:
    """Put `mcnemar_p_holm` into rows whose paired tests are read together, variant by variant.

    Args:
        rows: Metric rows.
        names: Metrics whose tests are read together, those of every detector.
        concept: Label of the rows that are meant.
    """
    tested = [row for row in rows if metric_of(row) in names and row["concept"] == concept and "mcnemar_p" in row]
    for variant in dict.fromkeys(row["variant"] for row in tested):
        own = [row for row in tested if row["variant"] == variant]
        for row, p in zip(own, holm([row["mcnemar_p"] for row in own]), strict=True):
            row["mcnemar_p_holm"] = p
