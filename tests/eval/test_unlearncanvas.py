"""UA, IRA, CRA and AA with oracle rows whose right answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from erasure.errors import EvaluationError
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import METRICS
from erasure.eval.metrics.unlearncanvas import average_accuracy, in_own_group, ua_ira_cra
from erasure.eval.statistics import weighted_rate
from erasure.eval.suites import Plan, Target
from erasure.eval.suites.canvas import CanvasSuite
from tests.eval.conftest import canvas_rows

CAT = Target("cat", "object", ("cat",))
INK = Target("ink", "style", ("ink",))
OBJECTS, STYLES = ("cat", "dog", "gun"), ("ink", "noto")


def oracle(forget: set[str] = frozenset(), wrong: str = "???") -> list[dict]:
    """Rows of a model that draws everything right but `forget`."""
    rows = []
    for name in OBJECTS:
        for style in STYLES:
            judged = {"object": wrong if name in forget else name, "style": wrong if style in forget else style}
            rows.append(
                {
                    "sample_id": f"{name}-{style}",
                    "prompt": f"{name} {style}",
                    "objects": [name],
                    "style": style,
                    "role": "target" if {name, style} & forget else "retain",
                    "weight": 1.0,
                    "judged": judged | {"shape": judged["object"]},
                }
            )
    return rows


def rates(rows: list[dict], *targets: Target) -> dict[str, float]:
    return {name: outcomes.rate() for name, outcomes in ua_ira_cra(rows, targets).items()}


def test_perfect_erasure() -> None:
    assert rates(oracle({"cat"}), CAT) == {"UA": 1, "UA_shape": 1, "IRA": 1, "CRA": 1, "CRA_retained": 1}
    assert rates(oracle({"ink"}), INK) == {"UA": 1, "IRA": 1, "CRA": 1, "CRA_retained": 1}
    assert rates(oracle({"ink", "cat"}), CAT, INK) == {"UA": 1, "UA_shape": 1, "IRA": 1, "CRA": 1, "CRA_retained": 1}


def test_no_erasure() -> None:
    found = rates(oracle(), CAT)
    assert found == {"UA": 0, "UA_shape": 0, "IRA": 1, "CRA": 1, "CRA_retained": 1}
    assert average_accuracy(oracle(), [CAT])["value"] == pytest.approx(2 / 3)


def test_cra_counts_the_targets_images_and_cra_retained_does_not() -> None:
    rows = oracle({"cat"})
    for row in rows:
        if row["objects"] == ["cat"]:
            row["judged"]["style"] = "broken"
    found = rates(rows, CAT)
    assert found["CRA"] == pytest.approx(4 / 6)
    assert found["CRA_retained"] == 1
    assert found["IRA"] == 1


def test_look_alikes_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evidence, "reasons", {"after": {"IRA_group": None}})
    groups = [("cat", "dog"), ("gun",)]
    lost = oracle({"dog"})
    for row in lost:
        row["role"] = "retain" if row["objects"] != ["cat"] else "target"
    counted = in_own_group(lost, [CAT], groups)
    assert (counted.rate(), len(counted.hits)) == (0.0, 2)
    assert rates(lost, CAT)["IRA"] == 0.5
    assert in_own_group(oracle({"gun"}), [CAT], groups).rate() == 1.0
    # A style has no group, a whole group leaves nothing of it, and an object may be alone in its own.
    for target in (INK, Target("animal", "object", ("cat", "dog")), Target("gun", "object", ("gun",))):
        assert in_own_group(oracle(), [target], groups).hits == ()
    metric = METRICS.get("IRA_group")
    for targets, value in (((CAT,), 0.0), ((INK,), None), ((CAT, INK), 0.0)):
        plan = Plan("s", "smoke", 0, targets, (), {}, (), tuple(groups))
        found = [row["value"] for row in metric.compute(Evidence(plan, {"after": lost}))]
        assert found == ([] if value is None else [value])


def test_collateral_damage_lowers_ira_only() -> None:
    found = rates(oracle({"cat", "dog"}), CAT)
    assert found["UA"] == 1
    assert found["IRA"] == 0.5
    assert found["CRA"] == 1


def test_unlearned_means_no_held_target_is_recognised() -> None:
    # Only "ink" is gone: "cat ink" still shows a cat, "dog ink" is unlearned, "cat noto" is not.
    outcomes = ua_ira_cra(oracle({"ink"}), [CAT, INK])["UA"]
    assert dict(zip(outcomes.keys, outcomes.hits, strict=True)) == {
        "cat-ink": False, "cat-noto": False, "dog-ink": True, "gun-ink": True,
    }  # fmt: skip


def test_a_failed_detection_is_missing_not_safe() -> None:
    rows = oracle()
    rows[0]["judged"] = None
    found = ua_ira_cra(rows, [CAT])
    assert (found["UA"].hits, found["UA"].missing) == ((False,), 1)
    for row in rows[:2]:
        row["judged"] = None
    table = canvas_rows(Plan("canvas", "full", 0, (CAT,), ()), {"before": rows})
    values = {row["name"]: row for row in table}
    assert values["UA"]["value"] is None
    assert values["UA"]["missing"] == 2
    assert values["AA"]["value"] is None


def test_weights_undo_stratified_sampling() -> None:
    rows = oracle({"cat"})
    for row in rows:
        row["weight"] = 0.5 if row["objects"] == ["cat"] else 1.25
        row["judged"]["style"] = "broken" if row["objects"] == ["cat"] else row["judged"]["style"]
    assert rates(rows, CAT)["CRA"] == pytest.approx(5 / 6)


def test_paired_rows_carry_mcnemar_and_transitions() -> None:
    plan = Plan("canvas", "full", 0, (CAT,), ())
    table = canvas_rows(plan, {"before": oracle(), "after": oracle({"cat"})})
    after = next(row for row in table if row["name"] == "UA" and row["variant"] == "after")
    assert after["value"] == 1
    assert after["transitions"] == {"both": 0, "before_only": 0, "after_only": 2, "neither": 0}
    assert after["mcnemar_p"] == 0.5
    assert after["mcnemar_p_holm"] == 1
    assert (after["low"], after["high"]) == pytest.approx((0.3424, 1), abs=1e-3)


def test_aa_interval_holds_the_value_and_has_width() -> None:
    rows = oracle({"cat"})
    rows[3]["judged"]["object"] = "???"
    found = average_accuracy(rows, [CAT])
    assert found["low"] <= found["value"] <= found["high"]
    assert found["low"] < found["high"]


def test_aa_interval_has_width_where_nothing_fails_and_no_more_than_the_rates_allow() -> None:
    rows = oracle({"cat"})
    found = average_accuracy(rows, [CAT])
    parts = [
        weighted_rate(o.hits, o.weights) for name, o in ua_ira_cra(rows, [CAT]).items() if name in ("UA", "IRA", "CRA")
    ]
    assert found["value"] == found["high"] == 1
    assert sum(part.low for part in parts) / 3 < found["low"] < 1


def test_suite_finds_concepts_and_groups(world_pipe) -> None:
    suite = CanvasSuite()
    for name, domain, members in [
        ("cat", "object", ("cat",)), ("kitten", "object", ("cat",)), ("Ink style", "style", ("ink",)),
        ("weapons", "object", ("gun",)), ("animal", "object", ("cat", "dog")), ("unsafe", "object", ("gun",)),
    ]:  # fmt: skip
        (target,) = suite.plan(world_pipe, [name], "full", 0).targets
        assert (target.domain, target.members) == (domain, members)
    with pytest.raises(EvaluationError, match="no concept 'zebra'; objects: cat, dog, gun"):
        suite.plan(world_pipe, ["zebra"], "full", 0)
    with pytest.raises(EvaluationError, match="no size"):
        suite.plan(world_pipe, ["cat"], "huge", 0)


@pytest.fixture
def canvas_pipe(tiny_pipe: Any) -> Any:
    """The tiny pipeline as if it were the embedded model: plans draw nothing."""
    from erasure import assets

    tiny_pipe.register_to_config(_name_or_path=str(assets.path("canvas-sd")))
    return tiny_pipe


def test_sizes_of_the_embedded_world(canvas_pipe) -> None:
    from erasure.assets.world import OBJECTS as THINGS
    from erasure.assets.world import STYLES as LOOKS

    suite = CanvasSuite()
    full = suite.plan(canvas_pipe, ["cat"], "full", 0).samples
    assert {(sample.objects[0], sample.style) for sample in full} == {
        (name, style) for name in THINGS for style in LOOKS
    }
    assert sum(sample.role == "target" for sample in full) == 4 * len(LOOKS)
    assert sum(sample.role == "retain" for sample in full) == (len(THINGS) - 1) * len(LOOKS)
    for concept, expected in [("cat", {("cat", style) for style in LOOKS}), ("noto", {(n, "noto") for n in THINGS})]:
        quick = suite.plan(canvas_pipe, [concept], "quick", 0).samples
        target = [sample for sample in quick if sample.role == "target"]
        assert {(sample.objects[0], sample.style) for sample in target} == expected
        assert len(target) >= 20
        kept = [sample for sample in quick if sample.role == "retain"]
        assert len(kept) == 48
        # Weights add up to the number of samples and give each stratum its share of the full set.
        assert sum(sample.weight for sample in quick) == pytest.approx(len(quick), rel=1e-4)
        share = sum(sample.weight for sample in target) / len(quick)
        assert share == pytest.approx(len(expected) / (len(THINGS) * len(LOOKS)), rel=1e-4)
    smoke = suite.plan(canvas_pipe, ["noto"], "smoke", 0).samples
    assert len(smoke) == 16


def test_the_same_prompt_has_the_same_noise_in_every_size(canvas_pipe) -> None:
    suite = CanvasSuite()
    full = {sample.sample_id: sample.key for sample in suite.plan(canvas_pipe, ["cat"], "full", 0).samples}
    quick = {sample.sample_id: sample.key for sample in suite.plan(canvas_pipe, ["noto"], "quick", 0).samples}
    other = {sample.sample_id: sample.key for sample in suite.plan(canvas_pipe, ["noto"], "full", 1).samples}
    shared = set(full) & set(quick)
    assert shared
    assert all(full[key] == quick[key] for key in shared)
    assert set(full) & set(other)
    assert all(full[key] != other[key] for key in set(full) & set(other))


def test_the_unseen_suite_asks_the_same_in_phrasings_of_its_own(canvas_pipe) -> None:
    from erasure.assets.world import HELD_OUT_TEMPLATES, TEMPLATES
    from erasure.eval import suites

    known, unseen = (suites.get(name).plan(canvas_pipe, ["cat"], "full", 0) for name in ("canvas", "canvas-unseen"))
    assert unseen.suite == "canvas-unseen"
    assert [s.sample_id for s in known.samples] == [s.sample_id for s in unseen.samples]
    assert [s.weight for s in known.samples] == [s.weight for s in unseen.samples]
    assert not {s.prompt for s in known.samples} & {s.prompt for s in unseen.samples}
    for sample in unseen.samples:
        assert sample.objects[0] in sample.prompt
        assert sample.style in sample.prompt
    assert not set(HELD_OUT_TEMPLATES) & set(TEMPLATES)
