"""Intervals and tests for rates and paired differences. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from erasure.errors import EvaluationError

MISSING_LIMIT = 0.25
"""Largest share of missing outcomes with which a rate or a mean is still given. Missing outcomes may all have gone the
same way, so a share m of them leaves a rate open by m: a quarter is about as much as the width of the 95 % interval of
ten images (0.28). Beyond that, a number would say more of what could be judged than of the model."""


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def wilson(k: float, n: float, confidence: float = 0.95) -> Interval:
    r"""Wilson score interval of a rate `k / n`.

    $$\frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}$$

    Args:
        k: Successes; may be fractional when samples carry weights and `n` is an effective size.
        n: Trials, at least one.
        confidence: Coverage, between 0 and 1.

    Raises:
        EvaluationError: `n` is not positive or `k` is outside 0 to `n`.
    """
    if n <= 0 or not -1e-9 <= k <= n + 1e-9:
        raise EvaluationError(f"a rate needs 0 <= k <= n and n > 0, got k={k} and n={n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = min(max(k / n, 0.0), 1.0)
    centre = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - reach) / scale, (centre + reach) / scale
    return Interval(p, min(max(low, 0.0), p), max(min(high, 1.0), p))


def weighted_rate(
    outcomes: Sequence[bool] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None
) -> Interval:
    """Weighted share of true outcomes with the Wilson interval at Kish's effective size `(sum w)^2 / sum w^2`.

    With equal weights this is exactly `wilson(sum(outcomes), len(outcomes))`.

    Raises:
        EvaluationError: There is no outcome.
    """
    hits = np.asarray(outcomes, dtype=np.float64)
    if hits.size == 0:
        raise EvaluationError("a rate over no samples: the suite has none for it, or every detection failed")
    w = np.ones_like(hits) if weights is None else np.asarray(weights, dtype=np.float64)
    size = w.sum() ** 2 / (w**2).sum()
    return wilson(float((w * hits).sum() / w.sum() * size), float(size))


def too_many_missing(missing: float, total: float) -> str | None:
    """Say why no number is given where too many outcomes are missing; `None` where one can be given.

    Args:
        missing: Number or weight of the outcomes that are missing.
        total: Number or weight of all outcomes.
    """
    if total <= 0:
        return "no sample"
    if missing >= total:
        return "no judged sample: every image shows nothing, or could not be judged"
    if missing > MISSING_LIMIT * total:
        return (
            f"{missing / total:.0%} of the outcomes are missing, because images show nothing (one colour) or "
            f"could not be judged; at most {MISSING_LIMIT:.0%} may be"
        )
    return None


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar test on discordant pairs.

    Args:
        b: Pairs that are true before and false after.
        c: Pairs that are false before and true after.

    Returns:
        The p-value: twice the smaller tail of Binomial(b + c, 1/2), at most 1.
    """
    n = b + c
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**n)


def transitions(before: Sequence[bool], after: Sequence[bool]) -> dict[str, int]:
    """The 2x2 table of paired outcomes: `both`, `before_only`, `after_only`, `neither`."""
    pairs = list(zip(before, after, strict=True))
    return {
        "both": sum(b and a for b, a in pairs),
        "before_only": sum(b and not a for b, a in pairs),
        "after_only": sum(a and not b for b, a in pairs),
        "neither": sum(not b and not a for b, a in pairs),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values that are read together, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], float],
    clusters: Sequence[Hashable],
    *,
    strata: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap that draws whole clusters with replacement.

    Images of one prompt are not independent, so the prompt is the unit that is drawn.

    Args:
        statistic: Maps row indices `(rows,)` to a number.
        clusters: Cluster of every row.
        strata: Stratum of every row; clusters are drawn within each, so that none comes out empty. A cluster
            belongs to the stratum of its first row.
        resamples: Number of draws.
        confidence: Coverage of the interval.
        seed: Of the draws.

    Raises:
        EvaluationError: There are no rows.
    """
    if not len(clusters):
        raise EvaluationError("a bootstrap needs one sample at least, and there are none")
    members: dict[Hashable, list[int]] = {}
    groups: dict[Hashable, list[Hashable]] = {}
    for row, cluster in enumerate(clusters):
        if cluster not in members:
            groups.setdefault(strata[row] if strata is not None else None, []).append(cluster)
        members.setdefault(cluster, []).append(row)
    rows_of = {cluster: np.asarray(rows) for cluster, rows in members.items()}
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        picked = [names[j] for names in groups.values() for j in rng.integers(len(names), size=len(names))]
        draws[i] = statistic(np.concatenate([rows_of[name] for name in picked]))
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(statistic(np.arange(len(clusters)))), float(low), float(high))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of `after - before` over pairs, with a bootstrap that draws pairs (or clusters of pairs)."""
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return cluster_bootstrap(
        lambda rows: float(change[rows].mean()),
        range(len(change)) if clusters is None else clusters,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
