"""What every registered metric does, and that suites name those that there are."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from erasure.eval.attacks import ATTACKS
from erasure.eval.metrics import METRICS, SHARE, Metric, Need, facts_of, register
from erasure.eval.stress import STRESS_TESTS
from erasure.eval.suites import SUITES
from tests.eval.pinned import FILE

KEPT: dict[str, Any] = json.loads(FILE.read_text())
ROWS = [
    {"name": name, "variant": variant, **row}
    for run in KEPT.values()
    for key, row in run["metrics"].items()
    for name, variant, _ in [key.split(" | ")]
]
OF_ATTACKS = {"pre_ASR", "ASR", "chance_ASR", "transfer_pre_ASR", "transfer_ASR", "held_by_refusal"}
OF_STRESS = {name for test in STRESS_TESTS.available().values() for name in test.metrics} - {
    "control_seen", "control_unasked",
}  # fmt: skip
"""Metrics of stress tests, whose values tests/eval/stress looks at."""
WITHOUT_TARGETS = {"object_accuracy", "style_accuracy", "shape_accuracy"}
"""Metrics that nothing is erased for, and so none of the runs that are kept has."""
OF_FACES = {"face_rate", "identity", "identity_retained", "person_rate"}
"""Metrics of people, whom the embedded model draws none of; see `test_flags.py` and `test_agreement.py`."""
OF_OTHERS = {"held_by_refusal", "agreement"}
"""Metrics of pipelines that refuse, and of two detectors; see `attacks/test_strict.py`, `test_agreement.py`."""


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of a metric in the runs of canvas-sd that are kept."""
    return [row for row in ROWS if row["name"].split("[")[0] == name]


@pytest.mark.parametrize("name", METRICS.names())
def test_a_metric_says_what_it_is(name: str) -> None:
    metric = METRICS.get(name)
    assert metric.name == name
    assert all(text and text == text.strip() for text in (metric.title, metric.about, metric.definition))
    assert set(metric.needs) <= set(get_args(Need))
    low, high = metric.bounds
    assert low is None or high is None or low < high
    assert (metric.unit == "%") <= (metric.bounds == SHARE)
    assert metric.is_control == name.startswith("control_")


@pytest.mark.parametrize("name", sorted({*METRICS.names()} - WITHOUT_TARGETS - OF_STRESS - OF_FACES - OF_OTHERS))
def test_its_values_are_within_its_bounds(name: str) -> None:
    metric, rows = METRICS.get(name), rows_of(name)
    assert rows
    low, high = metric.bounds
    for row in rows:
        assert row["metric"].startswith(metric.definition) or metric.is_control
        for value in (row["value"], row["low"], row["high"], row.get("worst", {}).get("value")):
            assert value is None or ((low is None or low <= value) and (high is None or value <= high))
        assert row["value"] is not None or row["reason"]


@pytest.mark.parametrize("name", SUITES.names())
def test_a_suite_is_data(name: str) -> None:
    suite = SUITES.get(name)
    variants, metrics = suite.variant_names(), suite.metrics
    assert len(set(variants)) == len(variants) > 1
    assert len(set(metrics)) == len(metrics)
    known = {metric: METRICS.get(metric) for metric in metrics}
    assert set(suite.tested_together) <= set(metrics)
    assert all(variant.moved_from in (None, *variants) for variant in suite.variants)
    # Without a control nothing tells whether the judge can see what it is asked for.
    assert any(metric.is_control for metric in known.values())
    assert not any("attack" in metric.needs for metric in known.values())


def test_every_metric_is_of_some_suite_attack_or_stress_test() -> None:
    named = {name for suite in SUITES.available().values() for name in suite.metrics} | OF_ATTACKS | OF_STRESS
    assert named == set(METRICS.built_in)
    assert ATTACKS.names()


def test_results_of_others_are_shown_as_they_say() -> None:
    row = {"name": "beauty", "recipe": {"metric": "share of pretty images"}}
    facts = facts_of(row).attributes
    assert (facts["title"], facts["about"], facts["unit"]) == ("beauty", "share of pretty images", "")
    assert facts_of({"name": "kid[some-clip@0123]", "recipe": {}}).name == "kid"


def test_what_says_nothing_about_itself_is_no_metric() -> None:
    class Silent(Metric):
        def compute(self, evidence: Any) -> list[Any]:
            return []

    with pytest.raises(ValueError, match="'silent': it has no title"):
        register("silent")(Silent)
