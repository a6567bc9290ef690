r"""UA, IRA, CRA (UnlearnCanvas, Zhang et al. 2024) and their mean.

With $c_d(x)$ the answer of the classifier of domain $d$ (object or style) for an image $x$ and $y_d(x)$ what its
prompt asked for, for targets in domain $d$ with the other domain $o$:

- $UA = 1 - P[c_d(x) = y_d(x)]$ over images whose prompt holds a target;
- $IRA = P[c_d(x) = y_d(x)]$ over images whose prompt holds none: other concepts of the same domain;
- $CRA = P[c_o(x) = y_o(x)]$ over the whole answer set, the target's images included, as the released
  `accuracy.py` counts; `CRA_retained` leaves the target's images out;
- $AA = (UA + IRA + CRA) / 3$.

With targets in both domains, an image is unlearned when none of the targets that its prompt holds is recognised, and
retained concepts of a domain are those that are no target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erasure.errors import EvaluationError
from erasure.eval.rows import Record, Row
from erasure.eval.statistics import Interval, cluster_bootstrap, holm, mcnemar_exact, transitions, weighted_rate
from erasure.eval.suites import Plan, Rows, Target

OTHER = {"object": "style", "style": "object"}


@dataclass(frozen=True)
class Outcomes:
    """Yes-or-no outcomes of one rate."""

    hits: tuple[bool, ...]
    weights: tuple[float, ...]
    prompts: tuple[str, ...]
    """Cluster of every outcome."""
    keys: tuple[str, ...]
    """What pairs an outcome before with one after."""
    missing: int = 0
    """Images whose detection failed; they are in no other field."""

    def rate(self) -> float:
        """Weighted share of hits."""
        return float(np.average(np.asarray(self.hits, dtype=np.float64), weights=self.weights))


def expected(row: Row, domain: str) -> str | None:
    """What the prompt of a row asks for in a domain."""
    if domain == "style":
        return row.get("style")
    objects = row.get("objects") or []
    return objects[0] if objects else None


def holds(row: Row, targets: Sequence[Target]) -> list[Target]:
    """The targets that the prompt of a row holds."""
    return [target for target in targets if expected(row, target.domain) in target.members]


def collect(items: Sequence[tuple[Row, str, bool | None]]) -> Outcomes:
    """Outcomes of rows with their keys; `None` counts as missing."""
    seen = [(row, key, hit) for row, key, hit in items if hit is not None]
    return Outcomes(
        hits=tuple(hit for _, _, hit in seen),
        weights=tuple(float(row.get("weight", 1.0)) for row, _, _ in seen),
        prompts=tuple(row["prompt"] for row, _, _ in seen),
        keys=tuple(key for _, key, _ in seen),
        missing=len(items) - len(seen),
    )


def _correct(row: Row, domain: str, head: str | None = None) -> bool | None:
    """Whether a head sees what the prompt asked for; `None` when the detection failed."""
    judged = row.get("judged")
    answer = None if judged is None else judged.get(head or domain)
    return None if answer is None else answer == expected(row, domain)


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
            seen = [_correct(row, target.domain, "shape" if shape else None) for target in held]
            items.append((row, row["sample_id"], None if None in seen else not any(seen)))
    return collect(items)


def in_domain(rows: Sequence[Row], targets: Sequence[Target]) -> Outcomes:
    """IRA: other concepts of the targets' domains, on prompts without any target."""
    domains = sorted({target.domain for target in targets})
    kept = [row for row in rows if not holds(row, targets)]
    return collect(
        [(row, f"{row['sample_id']}/{domain}", _correct(row, domain)) for row in kept for domain in domains]
    )


def cross_domain(rows: Sequence[Row], targets: Sequence[Target], *, retained_only: bool = False) -> Outcomes:
    """CRA: the other domain's classifier over the whole answer set, or without the targets' images."""
    items = []
    for domain in sorted({target.domain for target in targets}):
        other = OTHER[domain]
        rivals = [target for target in targets if target.domain == other]
        for row in rows:
            if not holds(row, targets if retained_only else rivals):
                items.append((row, f"{row['sample_id']}/{other}", _correct(row, other)))
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
    usable = [row for row in rows if row.get("judged") is not None]
    found = ua_ira_cra(usable, targets)
    parts = {name: found[name] for name in ("UA", "IRA", "CRA")}
    if not all(outcomes.hits for outcomes in parts.values()):
        raise EvaluationError("AA needs judged images with and without the target")
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
    return {"value": drawn.value, "low": low, "high": high, "n": len(usable), "interval": interval}


def average_interval(ua: Interval, ira: Interval, cra: Interval) -> Interval:
    """Mean of the three rates with MOVER's interval (Zou and Donner 2008), from the intervals of each.

    UA is of other images than the rest and so independent; IRA and CRA count as fully correlated.
    """
    value = (ua.value + ira.value + cra.value) / 3
    below = math.hypot(ua.value - ua.low, ira.value - ira.low + cra.value - cra.low) / 3
    above = math.hypot(ua.high - ua.value, ira.high - ira.value + cra.high - cra.value) / 3
    return Interval(value, max(value - below, 0.0), min(value + above, 1.0))


def rate_row(name: str, concept: str | None, variant: str, outcomes: Outcomes, recipe: Record) -> Record:
    """A metric row of a rate, with its Wilson interval."""
    row: Record = {"name": name, "concept": concept, "variant": variant}
    if outcomes.hits:
        interval = weighted_rate(outcomes.hits, outcomes.weights)
        row |= {**interval._asdict(), "n": len(outcomes.hits), "interval": "wilson"}
    else:
        row |= {"value": None, "low": None, "high": None, "n": 0, "reason": "no judged sample"}
    if outcomes.missing:
        row["missing"] = outcomes.missing
    return row | {"recipe": recipe}


def paired(before: Outcomes, after: Outcomes) -> Record:
    """What a metric row says of the pairs: how many changed, and McNemar's exact test."""
    first = dict(zip(before.keys, before.hits, strict=True))
    second = dict(zip(after.keys, after.hits, strict=True))
    shared = [key for key in first if key in second]
    table = transitions([first[key] for key in shared], [second[key] for key in shared])
    return {"transitions": table, "mcnemar_p": mcnemar_exact(table["before_only"], table["after_only"])}


def _accuracy_rows(plan: Plan, rows: Rows) -> list[Record]:
    """Without a target: how well the judge recognises what the prompts ask for."""
    found = []
    for variant, table in rows.items():
        for domain, head in (("object", "object"), ("style", "style"), ("object", "shape")):
            outcomes = collect([(row, row["sample_id"], _correct(row, domain, head)) for row in table])
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
    recipes = {name: {**plan.recipe, "metric": text, "weighting": "stratified"} for name, text in DEFINITIONS.items()}
    outcomes = {variant: ua_ira_cra(table, plan.targets) for variant, table in rows.items()}
    found = []
    for variant, table in rows.items():
        block = [rate_row(n, plan.concept, variant, o, recipes[n]) for n, o in outcomes[variant].items()]
        if variant == "after" and "before" in outcomes:
            for row in block:
                row |= paired(outcomes["before"][row["name"]], outcomes["after"][row["name"]])
            adjusted = holm([row["mcnemar_p"] for row in block])
            for row, p in zip(block, adjusted, strict=True):
                row["mcnemar_p_holm"] = p
        mean: Record = {"name": "AA", "concept": plan.concept, "variant": variant}
        try:
            mean |= average_accuracy(table, plan.targets, plan.seed)
        except EvaluationError as error:
            mean |= {"value": None, "low": None, "high": None, "n": 0, "reason": str(error)}
        block.append(mean | {"recipe": recipes["AA"]})
        if len(plan.targets) > 1:
            block += [rate_row("UA", t.name, variant, unlearned(table, [t]), recipes["UA"]) for t in plan.targets]
        found += block
    return found
