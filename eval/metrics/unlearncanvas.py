r"""UA, IRA, CRA (UnlearnCanvas, Zhang et al. 2024) and their mean.

With $c_d(x)$ the answer of the classifier of domain $d$ (object or style) for an image $x$ and $y_d(x)$ what its
prompt asked for, for targets in domain $d$ with the other domain $o$:

- $UA = 1 - P[c_d(x) = y_d(x)]$ over images whose prompt holds a target;
- $IRA = P[c_d(x) = y_d(x)]$ over images whose prompt holds none: other concepts of the same domain;
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
from collections.abc import Sequence

import numpy as np

from erasure.errors import EvaluationError
from erasure.eval.controls import Controls
from erasure.eval.metrics.instead import instead_metrics
from erasure.eval.metrics.outcomes import OTHER, Outcomes, collect, correct, holds, paired, rate_row, shows
from erasure.eval.rows import Record, Row, judged_of
from erasure.eval.statistics import Interval, cluster_bootstrap, holm, weighted_rate
from erasure.eval.suites import Plan, Rows, Target


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


def _accuracy_rows(plan: Plan, rows: Rows) -> list[Record]:
    """Without a target: how well the judge recognises what the prompts ask for."""
    found = []
    for variant, table in rows.items():
        for domain, head in (("object", "object"), ("style", "style"), ("object", "shape")):
            outcomes = collect([(row, row["sample_id"], correct(row, domain, head)) for row in table])
            recipe = {**plan.recipe, "metric": f"accuracy of the {head} head, closed set"}
            found.append(rate_row(f"{head}_accuracy", None, variant, outcomes, recipe))
    return found


DEFINITIONS = {
    "UA": "1 - accuracy on prompts with the target; closed set",
    "UA_shape": "1 - accuracy of the greyscale head on prompts with the target object; closed set",
    "IRA": "accuracy on the other concepts of the target's domain; closed set",
    "CRA": "accuracy of the other domain over the whole answer set, target included; closed set",
    "CRA_retained": "accuracy of the other domain on prompts without the target; closed set",
    "AA": "(UA + IRA + CRA) / 3",
}


def canvas_metrics(plan: Plan, rows: Rows) -> list[Record]:
    """All rate rows of a suite with objects and styles, before and after, with paired tests on the rows after.

    Args:
        plan: Targets and recipe.
        rows: Result rows by variant.
    """
    if not plan.targets:
        return _accuracy_rows(plan, rows)
    controls = Controls(plan, rows.get("before", ()))
    recipes = {name: {**plan.recipe, "metric": text, "weighting": "stratified"} for name, text in DEFINITIONS.items()}
    outcomes = {variant: ua_ira_cra(table, plan.targets) for variant, table in rows.items()}
    found = []
    for variant, table in rows.items():
        withheld = controls.reasons(table)
        block = [
            rate_row(name, plan.concept, variant, each, recipes[name], withheld=withheld[name])
            for name, each in outcomes[variant].items()
        ]
        tested = [row for row in block if row["value"] is not None]
        if variant == "after" and "before" in outcomes:
            for row in tested:
                row |= paired(outcomes["before"][row["name"]], outcomes["after"][row["name"]])
            adjusted = holm([row["mcnemar_p"] for row in tested])
            for row, p in zip(tested, adjusted, strict=True):
                row["mcnemar_p_holm"] = p
        mean: Record = {"name": "AA", "concept": plan.concept, "variant": variant}
        try:
            if withheld["AA"]:
                raise EvaluationError(withheld["AA"])
            mean |= average_accuracy(table, plan.targets, plan.seed)
        except EvaluationError as error:
            mean |= {"value": None, "low": None, "high": None, "n": 0, "reason": str(error)}
        block.append(mean | {"recipe": recipes["AA"]})
        if len(plan.targets) > 1:
            for target in plan.targets:
                why, own = controls.of_targets([target]) or controls.collapse(table), unlearned(table, [target])
                block.append(rate_row("UA", target.name, variant, own, recipes["UA"], withheld=why))
        found += block
    found += instead_metrics(plan, rows, {target: controls.of_targets([target]) for target in plan.targets})
    return found + [control.row(plan.recipe) for control in controls.all()]
