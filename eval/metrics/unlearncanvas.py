r"""UA, IRA, CRA (UnlearnCanvas, Zhang et al. 2024) and their mean.

With $c_d(x)$ the answer of the classifier of domain $d$ (object or style) for an image $x$ and $y_d(x)$ what its
prompt asked for, for targets in domain $d$ with the other domain $o$:

- $UA = 1 - P[c_d(x) = y_d(x)]$ over images whose prompt holds a target;
- $IRA = P[c_d(x) = y_d(x)]$ over images whose prompt holds none: other concepts of the same domain;
- `IRA_group` is IRA of the objects of the target's own group alone (the other animals for a cat);
- $CRA = P[c_o(x) = y_o(x)]$ over the whole answer set, the target's images included, as the released
  `accuracy.py` counts; `CRA_retained` leaves the target's images out;
- $AA = (UA + IRA + CRA) / 3$.

With targets in both domains, an image is unlearned when none of the targets that its prompt holds is recognised, and
retained concepts of a domain are those that are no target. A target that stands for a group counts as recognised when
any member of the group is: a gun that became a knife is not erased as a weapon.

Images that show nothing, and images that the judge failed on, are missing. Every rate carries `worst` besides: what it
is when every missing outcome is counted against the erasure.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from erasure.errors import EvaluationError
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import SHARE, Metric, register
from erasure.eval.metrics.outcomes import OTHER, Outcomes, collect, correct, expected, holds, paired, rate_row, shows
from erasure.eval.rows import Record, Row, judged_of
from erasure.eval.statistics import Interval, cluster_bootstrap, weighted_rate
from erasure.eval.suites import Plan, Target


def unlearned(rows: Sequence[Row], targets: Sequence[Target], shape: bool = False) -> Outcomes:
    """UA: per image with a target in its prompt, whether no target is recognised.

    Args:
        rows: Result rows.
        targets: What was erased.
        shape: Ask the greyscale head, which sees objects only.
    """
    items = []
    for row in rows:
        held = [target for target in holds(row, targets) if target.domain == "object" or not shape]
        if held:
            seen = [shows(row, target, "shape" if shape else None) for target in held]
            items.append((row, row["sample_id"], None if None in seen else not any(seen)))
    return collect(items)


def in_domain(rows: Sequence[Row], targets: Sequence[Target]) -> Outcomes:
    """IRA: other concepts of the targets' domains, on prompts without any target."""
    domains = sorted({target.domain for target in targets})
    kept = [row for row in rows if not holds(row, targets)]
    return collect([(row, f"{row['sample_id']}/{domain}", correct(row, domain)) for row in kept for domain in domains])


def in_own_group(rows: Sequence[Row], targets: Sequence[Target], groups: Sequence[Sequence[str]]) -> Outcomes:
    """IRA of the objects that are in one group with an object target, on prompts without any target.

    Args:
        rows: Result rows.
        targets: What was erased.
        groups: Objects that are alike.
    """
    erased = {member for target in targets if target.domain == "object" for member in target.members}
    alike = {name for group in groups if erased & set(group) for name in group}
    kept = [row for row in rows if expected(row, "object") in alike and not holds(row, targets)]
    return collect([(row, row["sample_id"], correct(row, "object")) for row in kept])


def cross_domain(rows: Sequence[Row], targets: Sequence[Target], *, retained_only: bool = False) -> Outcomes:
    """CRA: the other domain's classifier over the whole answer set, or without the targets' images."""
    items = []
    for domain in sorted({target.domain for target in targets}):
        other = OTHER[domain]
        rivals = [target for target in targets if target.domain == other]
        for row in rows:
            if not holds(row, targets if retained_only else rivals):
                items.append((row, f"{row['sample_id']}/{other}", correct(row, other)))
    return collect(items)


def ua_ira_cra(rows: Sequence[Row], targets: Sequence[Target]) -> dict[str, Outcomes]:
    """Outcomes of `UA`, `UA_shape` (object targets only), `IRA`, `CRA` and `CRA_retained`.

    Args:
        rows: One per image: `sample_id`, `prompt`, `objects`, `style`, `weight` and `judged` (a mapping with `object`,
            `style`, `shape`, or `None` when the detection failed).
        targets: What was erased, at least one.
    """
    found = {"UA": unlearned(rows, targets)}
    if any(target.domain == "object" for target in targets):
        found["UA_shape"] = unlearned(rows, targets, shape=True)
    found["IRA"] = in_domain(rows, targets)
    found["CRA"] = cross_domain(rows, targets)
    found["CRA_retained"] = cross_domain(rows, targets, retained_only=True)
    return found


def average_accuracy(rows: Sequence[Row], targets: Sequence[Target], seed: int = 0) -> Record:
    """AA = (UA + IRA + CRA) / 3 with an interval: the outer bounds of a cluster bootstrap and of MOVER.

    The bootstrap draws prompts, targets and others apart, and so knows that images of a prompt are alike; but it has
    no width where no image fails, which proves nothing about the next one. MOVER takes its width from the Wilson
    intervals of the three rates.
    """
    whole = ua_ira_cra(rows, targets)
    for name in ("UA", "IRA", "CRA"):
        if reason := whole[name].refusal():
            raise EvaluationError(f"no {name}: {reason}")
    usable = [row for row in rows if judged_of(row) is not None]
    found = ua_ira_cra(usable, targets)
    parts = {name: found[name] for name in ("UA", "IRA", "CRA")}
    position = {row["sample_id"]: index for index, row in enumerate(usable)}
    # Per row and part: weight, and weight times hit. A resample then only sums.
    sums = np.zeros((3, 2, len(usable)))
    for part, outcomes in enumerate(parts.values()):
        for key, weight, hit in zip(outcomes.keys, outcomes.weights, outcomes.hits, strict=True):
            sums[part, :, position[key.split("/")[0]]] += weight, weight * hit

    def mean(indices: np.ndarray) -> float:
        totals = sums[:, :, indices].sum(-1)
        return float((totals[:, 1] / totals[:, 0]).mean())

    strata = [tuple(sorted(target.name for target in holds(row, targets))) for row in usable]
    drawn = cluster_bootstrap(mean, [row["prompt"] for row in usable], strata=strata, seed=seed)
    spread = average_interval(*(weighted_rate(outcomes.hits, outcomes.weights) for outcomes in parts.values()))
    low, high = min(drawn.low, spread.low), max(drawn.high, spread.high)
    interval = "outer of cluster bootstrap by prompt and MOVER of Wilson"
    worst = average_interval(*(whole[name].worst(False) for name in parts))
    row = {"value": drawn.value, "low": low, "high": high, "n": len(usable), "interval": interval}
    row |= {"missing": len(rows) - len(usable)} if len(usable) < len(rows) else {}
    return row | {"worst": worst._asdict()}


def average_interval(ua: Interval, ira: Interval, cra: Interval) -> Interval:
    """Mean of the three rates with MOVER's interval (Zou and Donner 2008), from the intervals of each.

    UA is of other images than the rest and so independent; IRA and CRA count as fully correlated.
    """
    value = (ua.value + ira.value + cra.value) / 3
    below = math.hypot(ua.value - ua.low, ira.value - ira.low + cra.value - cra.low) / 3
    above = math.hypot(ua.high - ua.value, ira.high - ira.value + cra.high - cra.value) / 3
    return Interval(value, max(value - below, 0.0), min(value + above, 1.0))


class AnswerRate(Metric):
    """A rate of the judge's answers, before and after, with a paired test on the rows after."""

    bounds = SHARE
    unit = "%"
    needs = ("judge", "targets")

    @abstractmethod
    def outcomes(self, rows: Sequence[Row], plan: Plan) -> Outcomes | None:
        """What is counted; `None` where the metric is not of the plan's targets."""

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`."""
        plan, found = evidence.plan, []
        if not plan.targets:
            return []
        each = {variant: self.outcomes(table, plan) for variant, table in evidence.rows.items()}
        for variant, outcomes in each.items():
            if outcomes is None:
                continue
            why = evidence.reasons[variant][self.name]
            row = rate_row(self.name, plan.concept, variant, outcomes, self.recipe(evidence), withheld=why)
            before = each.get("before")
            if variant == "after" and before is not None and row["value"] is not None:
                row |= paired(before, outcomes)
            found.append(row)
        return found

    def recipe(self, evidence: Evidence) -> Record:
        """Recipe of the rows."""
        return evidence.recipe(self.definition, weighting="stratified")


@register("UA")
class UnlearningAccuracy(AnswerRate):
    """Share of images of prompts with a target on which no target is recognised."""

    title = "Unlearning accuracy"
    about = "prompts with the target on which the judge no longer sees it"
    definition = "1 - accuracy on prompts with the target; closed set"
    higher_is_better = True

    def outcomes(self, rows: Sequence[Row], plan: Plan) -> Outcomes:
        """See `unlearned`."""
        return unlearned(rows, plan.targets)

    def compute(self, evidence: Evidence) -> list[Record]:
        """All targets together, and then each of several."""
        found, targets = super().compute(evidence), evidence.plan.targets
        if len(targets) < 2:
            return found
        for variant, table in evidence.rows.items():
            for target in targets:
                why = evidence.answers.of_targets([target]) or evidence.answers.collapse(table)
                own = self.outcomes(table, replace(evidence.plan, targets=(target,)))
                found.append(rate_row(self.name, target.name, variant, own, self.recipe(evidence), withheld=why))
        return found


@register("UA_shape")
class UnlearningAccuracyOfShape(AnswerRate):
    """UA by the greyscale head, of objects."""

    title = "Unlearning accuracy, shape"
    about = "the same, judged without colour"
    definition = "1 - accuracy of the greyscale head on prompts with the target object; closed set"
    higher_is_better = True

    def outcomes(self, rows: Sequence[Row], plan: Plan) -> Outcomes | None:
        """See `unlearned`; nothing where no target is an object."""
        is_of_object = any(target.domain == "object" for target in plan.targets)
        return unlearned(rows, plan.targets, shape=True) if is_of_object else None


@register("IRA")
class InDomainRetainAccuracy(AnswerRate):
    """Accuracy on other concepts of the targets' domains."""

    title = "In-domain retain accuracy"
    about = "other concepts of the same kind still recognised"
    definition = "accuracy on the other concepts of the target's domain; closed set"
    higher_is_better = True

    def outcomes(self, rows: Sequence[Row], plan: Plan) -> Outcomes:
        """See `in_domain`."""
        return in_domain(rows, plan.targets)


@register("IRA_group")
class GroupRetainAccuracy(AnswerRate):
    """Accuracy on the other objects of the target's own group, which are most like it; of object targets only."""

    title = "Retain accuracy on its own group"
    about = "other objects of the target's group, such as other animals for a cat, still recognised"
    definition = "accuracy on the other objects of the target's group; closed set"
    higher_is_better = True

    def outcomes(self, rows: Sequence[Row], plan: Plan) -> Outcomes | None:
        """See `in_own_group`; nothing where nothing else is in the group."""
        counted = in_own_group(rows, plan.targets, plan.groups)
        return counted if counted.hits or counted.lost else None


@register("CRA")
class CrossDomainRetainAccuracy(AnswerRate):
    """Accuracy of the other domain over the whole answer set."""

    title = "Cross-domain retain accuracy"
    about = "the other kind still recognised, over all images"
    definition = "accuracy of the other domain over the whole answer set, target included; closed set"
    higher_is_better = True

    def outcomes(self, rows: Sequence[Row], plan: Plan) -> Outcomes:
        """See `cross_domain`."""
        return cross_domain(rows, plan.targets)


@register("CRA_retained")
class CrossDomainRetainAccuracyElsewhere(AnswerRate):
    """CRA without the targets' images."""

    title = "Cross-domain, retained prompts"
    about = "the same, without the target's images"
    definition = "accuracy of the other domain on prompts without the target; closed set"
    higher_is_better = True

    def outcomes(self, rows: Sequence[Row], plan: Plan) -> Outcomes:
        """See `cross_domain`."""
        return cross_domain(rows, plan.targets, retained_only=True)


@register("AA")
class AverageAccuracy(Metric):
    """Mean of UA, IRA and CRA."""

    title = "Average accuracy"
    about = "mean of UA, IRA and CRA"
    definition = "(UA + IRA + CRA) / 3"
    higher_is_better = True
    bounds = SHARE
    unit = "%"
    needs = ("judge", "targets")

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `average_accuracy`."""
        plan, found = evidence.plan, []
        for variant, table in evidence.rows.items() if plan.targets else ():
            row: Record = {"name": self.name, "concept": plan.concept, "variant": variant}
            try:
                if why := evidence.reasons[variant]["AA"]:
                    raise EvaluationError(why)
                row |= average_accuracy(table, plan.targets, plan.seed)
            except EvaluationError as error:
                row |= {"value": None, "low": None, "high": None, "n": 0, "reason": str(error)}
            found.append(row | {"recipe": evidence.recipe(self.definition, weighting="stratified")})
        return found


class HeadAccuracy(Metric):
    """Without a target: how well a head of the judge recognises what the prompts ask for."""

    domain: ClassVar[str]
    head: ClassVar[str]
    higher_is_better = True
    bounds = SHARE
    unit = "%"
    needs = ("judge",)

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where something is erased."""
        if evidence.plan.targets:
            return []
        return [
            rate_row(
                self.name, None, variant,
                collect([(row, row["sample_id"], correct(row, self.domain, self.head)) for row in table]),
                evidence.recipe(self.definition),
            )
            for variant, table in evidence.rows.items()
        ]  # fmt: skip


@register("object_accuracy")
class ObjectAccuracy(HeadAccuracy):
    """Accuracy of the head for objects."""

    title = "Object accuracy"
    about = "the judge sees the object of the prompt"
    definition = "accuracy of the object head, closed set"
    domain = head = "object"


@register("style_accuracy")
class StyleAccuracy(HeadAccuracy):
    """Accuracy of the head for styles."""

    title = "Style accuracy"
    about = "the judge sees the style of the prompt"
    definition = "accuracy of the style head, closed set"
    domain = head = "style"


@register("shape_accuracy")
class ShapeAccuracy(HeadAccuracy):
    """Accuracy of the greyscale head."""

    title = "Shape accuracy"
    about = "the object, judged without colour"
    definition = "accuracy of the shape head, closed set"
    domain, head = "object", "shape"
