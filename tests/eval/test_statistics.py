"""Intervals and tests against scipy and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from erasure.errors import EvaluationError
from erasure.eval.metrics.outcomes import adjust
from erasure.eval.statistics import (
    cluster_bootstrap,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    transitions,
    weighted_rate,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (47, 100), (1, 1)])
def test_wilson_agrees_with_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((k / n, expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_nonsense() -> None:
    for k, n in [(0, 0), (5, 3), (-1, 3)]:
        with pytest.raises(EvaluationError, match="0 <= k <= n"):
            wilson(k, n)


def test_equal_weights_change_nothing() -> None:
    hits = [True] * 7 + [False] * 3
    assert weighted_rate(hits, [0.3] * 10) == pytest.approx(wilson(7, 10))


def test_unequal_weights_give_the_weighted_mean_and_a_wider_interval() -> None:
    hits, weights = [True] * 5 + [False] * 5, [3.0] * 5 + [1.0] * 5
    found = weighted_rate(hits, weights)
    assert found.value == pytest.approx(0.75)
    plain = wilson(7.5, 10)
    assert found.high - found.low > plain.high - plain.low


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (3, 9), (10, 10), (30, 4)])
def test_mcnemar_agrees_with_the_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected)
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


def test_transitions_count_pairs() -> None:
    found = transitions([True, True, False, False, True], [True, False, True, False, False])
    assert found == {"both": 1, "before_only": 2, "after_only": 1, "neither": 1}


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_tests_of_several_detectors_are_read_together() -> None:
    rows: list[dict[str, Any]] = [
        {"name": name, "concept": "cat", "variant": "after", "mcnemar_p": p}
        for name, p in (("flagged_rate[a]", 0.01), ("flagged_rate[b]", 0.04), ("blank_rate", 0.5))
    ]
    adjust(rows, ("flagged_rate",), "cat")
    assert [row.get("mcnemar_p_holm") for row in rows] == [0.02, 0.04, None]


def test_bootstrap_of_singletons_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).normal(size=60)
    found = cluster_bootstrap(lambda rows: values[rows].mean(), range(60), resamples=4000)
    expected = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile").confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_bootstrap_respects_clusters() -> None:
    # Ten rows per cluster that all agree carry no more than one row per cluster.
    values = np.repeat(np.random.default_rng(1).normal(size=20), 10)
    clustered = cluster_bootstrap(lambda rows: values[rows].mean(), [i // 10 for i in range(200)])
    naive = cluster_bootstrap(lambda rows: values[rows].mean(), range(200))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_bootstrap_strata_never_come_out_empty() -> None:
    strata = ["rare"] + ["common"] * 50
    found = cluster_bootstrap(lambda rows: float((rows == 0).sum()), range(51), strata=strata, resamples=50)
    assert (found.low, found.high) == (1.0, 1.0)


def test_paired_bootstrap_sees_a_small_steady_change() -> None:
    before = np.random.default_rng(2).normal(size=40)
    found = paired_bootstrap(before, before + 0.01)
    assert found == pytest.approx((0.01, 0.01, 0.01))
    with pytest.raises(EvaluationError):
        paired_bootstrap([], [])
