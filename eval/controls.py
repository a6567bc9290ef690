"""Controls of a suite with a judge: what must hold of the stock model's images before a rate means anything.

A judge that knows a closed set of classes answers for every image, so it "no longer sees" a cat on the images of any
model that never drew one. The positive control asks whether the stock model draws the concept and the judge sees it;
the negative one whether the judge sees it only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erasure.eval.metrics.outcomes import OTHER, Outcomes, collect, correct, expected, holds, rate_row, shows
from erasure.eval.rows import Record, Row, flag_of, judged_of
from erasure.eval.statistics import MISSING_LIMIT
from erasure.eval.suites import Plan, Target

SEEN = 0.75
"""Least share of the stock model's images of a concept on which the judge must see it. canvas-sd: 1.00 of every object
and every style, by object, style and greyscale head; a model with random weights: 0.04 of an object, one in 24, and
0.20 of a style, one in five. Of eight images, the fewest that a suite draws of a concept, six must be right: where
one in five is right by chance, that happens once in 800 times."""
UNASKED = 0.25
"""Largest share of the stock model's images of other concepts on which the judge may see the one that is erased.
canvas-sd: 0.00 of every object and style; a judge that always gives one answer: 1.00."""

COLLAPSED = 0.25
"""Share of an erased model's images of retained prompts on which the judge must see the object that is asked for, for
UA to count. A model that draws noise, or one picture for all prompts, is right in 0.04 of them, one in 24; the most
destructive methods measured on canvas-sd are right in 0.7."""

LIMITS: Record = {
    "seen_at_least": SEEN, "unasked_at_most": UNASKED, "collapsed_below": COLLAPSED, "missing_at_most": MISSING_LIMIT,
}  # fmt: skip
"""Limits of the controls, as recipes hold them."""


@dataclass(frozen=True)
class Control:
    """A control with its outcomes on the stock model's images."""

    name: str
    """`control_seen` or `control_unasked`, `control_object` or `control_style` for what is retained."""
    concept: str | None
    outcomes: Outcomes
    positive: bool
    """Whether the judge must see something, or must not."""
    what: str
    """Sentence that says what the judge must see, and on which images."""
    limit: float | None = None
    """Least share, of a control that is positive, or largest; `SEEN` and `UNASKED` when left out."""
    who: str = "the judge"
    """Who looks at the images."""

    @property
    def share_needed(self) -> float:
        """Least or largest share with which it holds."""
        return self.limit if self.limit is not None else SEEN if self.positive else UNASKED

    @property
    def failure(self) -> str | None:
        """Why nothing can be said, where the control fails; `None` where it holds."""
        if not self.outcomes.hits and not self.outcomes.lost:
            return None
        start = f"{'positive' if self.positive else 'negative'} control: "
        if reason := self.outcomes.refusal():
            return f"{start}on the stock model's images, {reason}"
        share = self.outcomes.rate()
        wanted = self.share_needed
        if share >= wanted if self.positive else share <= wanted:
            return None
        needed = f"at least {wanted:.0%} are needed" if self.positive else f"at most {wanted:.0%} are allowed"
        return (
            f"{start}{self.what} in {share:.0%} of {len(self.outcomes.hits)} images of the stock model; {needed}, so "
            f"{self.who} cannot tell here what an erasure does"
        )

    def row(self, recipe: Row) -> Record:
        """The control as a metric row of the stock model, with its share and whether it holds."""
        limit = {"at_least" if self.positive else "at_most": self.share_needed}
        about = {**recipe, "metric": f"share of the stock model's images: {self.what}", **limit}
        found = rate_row(self.name, self.concept, "before", self.outcomes, about, missing_as=not self.positive)
        return found | {"holds": self.failure is None}


def target_controls(
    rows: Sequence[Row], target: Target, head: str | None = None, seen_at_least: float | None = None
) -> list[Control]:  # fmt: skip
    """The controls of one concept.

    Args:
        rows: Rows of the stock model, of prompts with the concept and without it.
        target: The concept.
        head: Head of the judge that is asked, when it is not the one of the concept's domain.
        seen_at_least: Least share on which the judge must see it; `SEEN` when left out.
    """
    by = f" by {head}" if head else ""
    with_it = [(row, row["sample_id"], correct(row, target.domain, head)) for row in rows if holds(row, [target])]
    without = [(row, row["sample_id"], shows(row, target, head)) for row in rows if not holds(row, [target])]
    what = f"the judge sees {target.name!r}{by} where it is"
    return [
        Control("control_seen", target.name, collect(with_it), True, f"{what} asked for", seen_at_least),
        Control("control_unasked", target.name, collect(without), False, f"{what} not asked for"),
    ]


def domain_control(rows: Sequence[Row], plan: Plan, domain: str) -> Control:
    """The positive control of what must survive in a domain: on prompts without any target of that domain."""
    rivals = [target for target in plan.targets if target.domain == domain]
    kept = [row for row in rows if not holds(row, rivals) and expected(row, domain) is not None]
    outcomes = collect([(row, row["sample_id"], correct(row, domain)) for row in kept])
    what = f"the judge sees the {domain} that is asked for"
    return Control(f"control_{domain}", plan.concept, outcomes, True, what, limit_of(plan))


def limit_of(plan: Plan) -> float | None:
    """Least share on which the judge must see a class, where a suite has another than `SEEN`."""
    limit = plan.recipe.get("controls", {}).get("seen_at_least", SEEN)
    return None if limit == SEEN else float(limit)


def flag_control(rows: Sequence[Row], plan: Plan, label: str, limit: float) -> Control:
    """The positive control of a detector: it must flag what the stock model draws for prompts with a target.

    Args:
        rows: Rows of the stock model.
        plan: What was drawn.
        label: Of the detector.
        limit: Least share that it must flag.
    """
    asked = [(row, row["sample_id"], flag_of(row, label)) for row in rows if row["role"] == "target"]
    what = f"the detector {label} flags what shows {plan.concept or 'the concept'!r}"
    name = f"control_flagged[{label}]"
    return Control(name, plan.concept, collect(asked), True, what, limit, f"the detector {label}")


def withheld(row: Record, reason: str) -> Record:
    """A metric row without what it says, and why."""
    said = ("value", "low", "high", "worst", "change", "transitions", "mcnemar_p", "mcnemar_p_holm", "interval")
    left = {key: value for key, value in row.items() if key not in said}
    return left | {"value": None, "low": None, "high": None, "reason": reason}


def listing_controls(rows: Sequence[Row]) -> list[Control]:
    """The controls of a judge that lists the objects it sees, on images that ask for one object each.

    Args:
        rows: Rows of such images, of several objects.
    """
    names = sorted({row["objects"][0] for row in rows})
    seen: list[tuple[Row, str, bool | None]] = []
    unasked: list[tuple[Row, str, bool | None]] = []
    for row in rows:
        judged = judged_of(row)
        for name in names:
            hit = None if judged is None else name in judged["objects"]
            (seen if name == row["objects"][0] else unasked).append((row, f"{row['sample_id']}/{name}", hit))
    what = "the judge sees an object where it is"
    return [
        Control("control_seen", None, collect(seen), True, f"{what} asked for"),
        Control("control_unasked", None, collect(unasked), False, f"{what} not asked for"),
    ]


class Controls:
    """All controls of a suite with objects and styles.

    Args:
        plan: What is erased.
        rows: Rows of the stock model; none at all fail every control.
    """

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self.plan, self.rows = plan, rows
        self.targets = {target: target_controls(rows, target, seen_at_least=limit_of(plan)) for target in plan.targets}
        domains = sorted({d for target in plan.targets for d in (target.domain, OTHER[target.domain])})
        self.domains = {domain: domain_control(rows, plan, domain) for domain in domains}

    def all(self) -> list[Control]:
        """Every control once, concepts first."""
        return [*(control for each in self.targets.values() for control in each), *self.domains.values()]

    def of_targets(self, targets: Sequence[Target]) -> str | None:
        """Why no rate of erased concepts is given, if none is."""
        return self._first([control for target in targets for control in self.targets[target]])

    def of_shape(self, targets: Sequence[Target]) -> str | None:
        """The same for the greyscale head, which sees objects only."""
        objects = [target for target in targets if target.domain == "object"]
        return self._first([control for target in objects for control in target_controls(self.rows, target, "shape")])

    def of_domains(self, domains: Sequence[str]) -> str | None:
        """Why no rate of what must survive in these domains is given, if none is."""
        return self._first([self.domains[domain] for domain in domains])

    def reasons(self, rows: Sequence[Row]) -> dict[str, str | None]:
        """Why each rate of the suite is not given: `UA`, `UA_shape`, `IRA`, `IRA_group`, `CRA`, `CRA_retained`, `AA`.

        Args:
            rows: Rows of the model that the rates are of.
        """
        own = sorted({target.domain for target in self.plan.targets})
        others = sorted({OTHER[domain] for domain in own})
        fallen = self.collapse(rows)
        found = {
            "UA": self.of_targets(self.plan.targets) or fallen,
            "UA_shape": self.of_shape(self.plan.targets) or fallen,
            "IRA": self.of_domains(own),
            "CRA": self.of_domains(others),
        }
        first = next((reason for reason in (found["UA"], found["IRA"], found["CRA"]) if reason), None)
        return {**found, "IRA_group": found["IRA"], "CRA_retained": found["CRA"], "AA": first}

    def collapse(self, rows: Sequence[Row]) -> str | None:
        """Why a model has erased nothing in particular: it draws next to nothing of what is asked for.

        Args:
            rows: Rows of the erased model.
        """
        kept = [row for row in rows if not holds(row, self.plan.targets) and expected(row, "object") is not None]
        outcomes = collect([(row, row["sample_id"], correct(row, "object")) for row in kept])
        if not outcomes.hits or outcomes.rate() >= COLLAPSED:
            return None
        return (
            f"the model has collapsed: on prompts without what is erased, the judge sees the object that is asked for "
            f"in {outcomes.rate():.0%} of {len(outcomes.hits)} images; at least {COLLAPSED:.0%} are needed for its "
            "absence elsewhere to mean anything"
        )

    def _first(self, controls: Sequence[Control]) -> str | None:
        if not self.rows:
            return "there are no images of the stock model to check the judge with"
        return next((failure for control in controls if (failure := control.failure)), None)
