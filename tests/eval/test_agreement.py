"""Two detectors on the same pictures; ranks of classes; people; names that are most like the target's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from erasure.eval.evidence import Evidence
from erasure.eval.metrics import METRICS
from erasure.eval.metrics.agreement import cohens_kappa
from erasure.eval.metrics.ranks import by_likeness, rank
from erasure.eval.report import value_cell
from erasure.eval.suites import Plan, Target

RECIPE = {"detector": "d", "classes": ["x"], "flags": ["x"], "threshold": 0.5}


def finding(flagged: bool | None, labels: tuple[str, ...] = (), scores: dict[str, float] | None = None) -> Any:
    return {
        "flagged": flagged, "score": None, "labels": list(labels), "scores": scores or {}, "boxes": {}, "reason": None,
    }  # fmt: skip


def row(index: int, found: dict[str, Any], role: str = "target", objects: tuple[str, ...] = ("x",)) -> dict[str, Any]:
    return {
        "sample_id": f"{index:06d}-0", "prompt": f"prompt {index}", "role": role, "objects": list(objects),
        "style": None, "erased": list(objects) if role == "target" else [], "blank": False, "failures": {},
        "judged": None, "detected": found,
    }  # fmt: skip


def evidence(rows: dict[str, Any], recipes: dict[str, Any], flagging: tuple[str, ...], **more: Any) -> Evidence:
    entries = {label: {"label": label, "recipe": RECIPE | recipe} for label, recipe in recipes.items()}
    plan = Plan("s", "smoke", 0, (Target("x", "object", ("x",)),), (), {})
    return Evidence(plan, rows, detectors=entries, flagging=flagging, **more)


def pairs(*flags: tuple[bool | None, bool | None]) -> list[dict[str, Any]]:
    return [row(index, {"a": finding(one), "b": finding(other)}) for index, (one, other) in enumerate(flags)]


def test_kappa_is_that_of_the_formula() -> None:
    # Cohen's table of 20 and 5, 10 and 15: (0.7 - 0.5) / (1 - 0.5).
    first = np.repeat([True, True, False, False], [20, 5, 10, 15])
    second = np.repeat([True, False, True, False], [20, 5, 10, 15])
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa(first, first) == 1.0
    assert cohens_kappa(first, ~first) == pytest.approx(-1.0, abs=0.05)
    assert cohens_kappa(np.ones(3, bool), np.ones(3, bool)) == 1.0
    independent = np.tile([True, False], 50), np.repeat([True, False], 50)
    assert cohens_kappa(*independent) == pytest.approx(0.0)


def test_agreement_counts_pairs_and_what_one_of_them_cannot_judge() -> None:
    rows = pairs(
        *[(True, True)] * 20, *[(True, False)] * 5, *[(False, True)] * 10, *[(False, False)] * 15, (None, True)
    )
    (found,) = METRICS.get("agreement").compute(evidence({"after": rows}, {"a": {}, "b": {}}, ("a", "b")))
    assert found["name"] == "agreement[a / b]"
    assert found["value"] == pytest.approx(0.4)
    assert found["low"] < 0.4 < found["high"]
    assert (found["n"], found["missing"]) == (50, 1)
    assert found["pairs"] == {"both": 20, "a only": 5, "b only": 10, "neither": 15}
    assert set(found["recipe"]["detectors"]) == {"a", "b"}
    cell = value_cell(found)
    assert cell is not None
    assert "a only 5, b only 10" in cell.detail


def test_agreement_is_not_given_where_nothing_tells_it_from_chance() -> None:
    metric = METRICS.get("agreement")
    (found,) = metric.compute(evidence({"after": pairs(*[(False, False)] * 9)}, {"a": {}, "b": {}}, ("a", "b")))
    assert found["value"] is None
    assert found["pairs"]["neither"] == 9
    assert "both detectors say no of every image" in found["reason"]
    (found,) = metric.compute(evidence({"after": pairs((None, True), (True, True))}, {"a": {}, "b": {}}, ("a", "b")))
    assert "50% of the outcomes are missing" in found["reason"]
    assert not metric.compute(evidence({"after": pairs((True, True))}, {"a": {}, "b": {}}, ("a",)))


def test_three_detectors_are_three_pairs() -> None:
    rows = [row(i, {name: finding(i % 2 == 0) for name in "abc"}) for i in range(8)]
    found = METRICS.get("agreement").compute(evidence({"after": rows}, {name: {} for name in "abc"}, ("a", "b", "c")))
    assert [each["name"] for each in found] == ["agreement[a / b]", "agreement[a / c]", "agreement[b / c]"]
    assert {each["value"] for each in found} == {1.0}


def test_ranks() -> None:
    scores = {"x": 0.3, "y": 0.4, "z": 0.2, "w": 0.1}
    assert [rank(scores, (name,)) for name in "yxzw"] == [1, 2, 3, 4]
    assert rank(scores, ("w", "x")) == 2
    assert rank(scores, ("v",)) == 5


@pytest.mark.parametrize(("name", "among"), [("UA_top3", 3), ("UA_top5", 5)])
def test_a_target_is_gone_only_where_it_is_not_among_the_likeliest(
    name: str, among: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evidence, "reasons", {"after": {"UA": None}})
    classes = [*"abcdefgh", "x"]

    def placed(place: int) -> dict[str, float]:
        order = [*"abcdefgh"]
        order.insert(place - 1, "x")
        return {each: 1 / (index + 2) for index, each in enumerate(order)}

    rows = [row(place, {"head": finding(False, (), placed(place))}) for place in range(1, 9)]
    rows.append(row(9, {"head": finding(None)}))
    (found,) = METRICS.get(name).compute(evidence({"after": rows}, {"head": {"classes": classes}}, ()))
    assert found["value"] == pytest.approx((8 - among) / 8)
    assert found["missing"] == 1
    assert found["worst"]["value"] == pytest.approx((8 - among) / 9)
    (few,) = METRICS.get(name).compute(evidence({"after": rows}, {"head": {"classes": list("xab")}}, ()))
    assert few["value"] is None
    assert "tells 3 classes apart" in few["reason"]
    assert not METRICS.get(name).compute(evidence({"after": rows}, {"head": {"classes": classes}}, ("head",)))


def test_people_are_seen_by_parts_of_their_bodies() -> None:
    body, none = finding(False, ("BELLY_COVERED",)), finding(False, ())
    rows = {"before": [row(0, {"n": body}), row(1, {"n": body})], "after": [row(0, {"n": body}), row(1, {"n": none})]}
    before, after = METRICS.get("person_rate").compute(evidence(rows, {"n": {"classes": ["BELLY_COVERED"]}}, ("n",)))
    assert (before["value"], after["value"]) == (1.0, 0.5)
    assert after["transitions"]["before_only"] == 1
    # Of faces alone there is a metric already.
    assert not METRICS.get("person_rate").compute(evidence(rows, {"n": {"classes": ["face"]}}, ("n",)))


class Texts:
    """A CLIP model whose features of a name lie the closer to the target's, the larger its number."""

    fingerprint = "texts"

    def texts(self, names: list[str]) -> np.ndarray:
        angles = [0.0 if name == "x" else np.pi / 2 * (1 - int(name[1:]) / 100) for name in names]
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_names_that_are_most_like_the_targets_are_a_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evidence, "reasons", {"after": {"IRA": None}})
    names = [f"n{number}" for number in range(20)]
    rows = []
    for index, name in enumerate(names):
        made = row(index, {}, "retain", (name,))
        # The two names nearest to the target are lost, and no other.
        made["judged"] = {"object": "x" if index >= 18 else name, "objects": [], "style": None}
        rows.append(made)
    clip: Any = Texts()
    (found,) = METRICS.get("IRA_nearest").compute(evidence({"after": rows}, {}, (), clip=clip))
    assert (found["value"], found["n"]) == (0.0, 2)
    assert found["recipe"]["nearest"] == ["n18", "n19"]
    assert list(found["groups"].values()) == [1.0] * 9 + [0.0]
    cell = value_cell(found)
    assert cell is not None
    assert "10 of 10: 2 names 0.0 %" in cell.detail
    (none,) = METRICS.get("IRA_nearest").compute(evidence({"after": rows}, {}, (), clip_missing="no CLIP model"))
    assert (none["value"], none["reason"]) == (None, "no CLIP model")


def test_the_names_are_those_of_the_targets_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evidence, "reasons", {"after": {"IRA": None}})
    rows = []
    for index, style in enumerate(["x", "n10", "n20", "n90"]):
        made = row(index, {}, "target" if style == "x" else "retain", ("n99",)) | {"style": style}
        made["judged"] = {"object": "n99", "objects": ["n99"], "style": "x" if style == "n90" else style}
        rows.append(made)
    clip: Any = Texts()
    plan = Plan("s", "smoke", 0, (Target("x", "style", ("x",)),), (), {})
    (found,) = METRICS.get("IRA_nearest").compute(Evidence(plan, {"after": rows}, clip=clip))
    assert (found["value"], found["n"], found["recipe"]["nearest"]) == (0.0, 1, ["n90"])
    assert list(found["groups"].values()) == [1.0, 1.0, 0.0]


def test_few_names_are_each_a_group() -> None:
    assert by_likeness(["a", "b", "c"], np.asarray([0.2, 0.9, 0.1])) == [["c"], ["a"], ["b"]]
    groups = by_likeness([str(number) for number in range(25)], np.arange(25.0))
    assert [len(group) for group in groups] == [3] * 5 + [2] * 5
    assert groups[-1] == ["23", "24"]


def test_suites_compute_them() -> None:
    from erasure.eval.suites import SUITES

    def metrics(name: str) -> set[str]:
        kit: Any = SimpleNamespace(metrics=SUITES.get(name).metrics)
        return set(kit.metrics)

    assert {"UA_top3", "IRA_nearest"} <= metrics("artists")
    assert "UA_top5" in metrics("imagenette")
    assert {"agreement", "person_rate"} <= metrics("i2p") & metrics("nudity-benign") & metrics("prompts")
