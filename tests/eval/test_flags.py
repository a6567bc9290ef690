"""Metrics of detectors' flags on rows whose numbers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from erasure.eval.controls import flag_control
from erasure.eval.detectors.judging import CLEAR, FLAGGED
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import METRICS
from erasure.eval.metrics.flags import AT_ONCE, harmonic, highest
from erasure.eval.statistics import wilson
from erasure.eval.suites import Plan, Target

RECIPE = {"detector": "d", "classes": ["x", "face"], "flags": ["x"], "threshold": 0.5}
SHARE = {"value": 0.9, "low": 0.6, "high": 1.0, "n": 10, "missing": 0, "worst": 0.9, "reason": None}


def finding(flagged: bool | None, score: float | None = None, labels: tuple[str, ...] = (), **more: Any) -> Any:
    return {
        "flagged": flagged,
        "score": score,
        "labels": list(labels),
        "scores": {},
        "boxes": {},
        "reason": None,
    } | more


def row(name: str, role: str, found: Any, **more: Any) -> dict[str, Any]:
    judged = None if found["flagged"] is None else {"object": FLAGGED if found["flagged"] else CLEAR, "objects": []}
    objects = [FLAGGED if role == "target" else CLEAR]
    return {
        "sample_id": name, "prompt": name, "role": role, "objects": objects, "style": None, "erased": [],
        "blank": False, "failures": {}, "judged": judged, "detected": {"d": found}, **more,
    }  # fmt: skip


def evidence(before: list[Any], after: list[Any], *, controls: Any = None, limit: float = 0.5) -> Evidence:
    plan = Plan("s", "smoke", 0, (Target("nudity", "object", (FLAGGED,)),), (), {})
    rows = {"before": before} | ({"after": after} if after else {})
    entry = {"label": "d", "recipe": RECIPE, "self_test": {}, "controls": controls}
    return Evidence(plan, rows, {}, None, None, [flag_control(before, plan, "d", limit)], {"d": entry}, ("d",))


def of(name: str, found: Evidence, variant: str = "after") -> dict[str, Any]:
    (only,) = [each for each in METRICS.get(name).compute(found) if each["variant"] == variant]
    return only


def rows_of(flags: list[bool | None], role: str = "target") -> list[dict[str, Any]]:
    scores = {True: 0.8, False: 0.3, None: None}
    return [row(f"{index:06d}-0", role, finding(flag, scores[flag])) for index, flag in enumerate(flags)]


def test_a_rate_counts_what_is_missing_against_the_erasure() -> None:
    found = of("flagged_rate", evidence(rows_of([True] * 4 + [False]), rows_of([True, False, False, False, None])))
    assert (found["value"], found["n"], found["missing"]) == (0.25, 4, 1)
    assert (found["low"], found["high"]) == tuple(wilson(1, 4)[1:])
    assert found["worst"]["value"] == 0.4
    assert found["transitions"] == {"both": 1, "before_only": 3, "after_only": 0, "neither": 0}
    assert found["mcnemar_p"] == 0.25
    assert found["curve"]["0.3"] == 1.0
    assert found["curve"]["0.35"] == 0.25
    assert found["curve"]["0.85"] == 0.0


@pytest.mark.parametrize("name", ["flagged_rate", "expected_max"])
def test_nothing_is_said_where_the_stock_images_do_not_show_it(name: str) -> None:
    found = evidence(rows_of([False] * 4), rows_of([False] * 4))
    for variant in ("before", "after"):
        row = of(name, found, variant)
        assert row["value"] is None
        assert "in 0% of 4 images of the stock model" in row["reason"]
    nobody = evidence([], [])
    assert "no images of the stock model" in str(nobody.unseen("d"))


def test_too_many_missing_give_no_rate() -> None:
    found = of("flagged_rate", evidence(rows_of([True] * 4), rows_of([None, None, False, False])))
    assert found["value"] is None
    assert "50% of the outcomes are missing" in found["reason"]
    assert found["worst"]["value"] == 0.5


def test_new_flags_need_a_detector_that_is_known_to_see() -> None:
    kept = rows_of([False, False, True, False], "retain")
    after = rows_of([True, False, True, None], "retain")
    alone = of("new_flags", evidence(kept, after))
    assert alone["value"] is None
    assert "sensitivity was not measured" in alone["reason"]
    poor = of("new_flags", evidence(kept, after, controls={"sensitivity": SHARE | {"value": 0.5}}))
    assert "its sensitivity on your controls is 50%" in poor["reason"]
    known = of("new_flags", evidence(kept, after, controls={"sensitivity": SHARE}))
    assert (known["value"], known["missing"], known["worst"]["value"]) == (1 / 3, 1, 0.5)
    assert known["transitions"]["after_only"] == 1
    target = rows_of([True] * 4)
    for index, each in enumerate(target):
        each["sample_id"] = f"t{index}-0"
    shown = of("new_flags", evidence([*kept, *target], [*after, *target]))
    assert shown["value"] == 1 / 3


def test_labels_count_images_and_regions() -> None:
    boxes = {"x": [0, 0, 1, 1], "x#2": [0, 0, 1, 1], "face": [0, 0, 1, 1]}
    seen = finding(True, 0.9, ("x", "face"), boxes=boxes, scores={"x": 0.9, "x#2": 0.6, "face": 0.7})
    weak = finding(False, 0.4, ("face",), boxes=boxes, scores={"x": 0.4, "x#2": 0.3, "face": 0.9})
    rows = [row("0-0", "target", seen), row("1-0", "target", weak)]
    found = of("labels", evidence(rows, []), "before")
    assert found["classes"] == {"face": 1.0, "x": 0.5}
    assert (found["regions"], found["n"]) == (2, 2)


def test_faces_and_blank_images_are_counted() -> None:
    faced = finding(False, 0.1, ("face",))
    before = [row(f"{i}-0", "target", faced) for i in range(4)]
    after = [row("0-0", "target", faced), row("1-0", "target", finding(False, 0.1)),
             row("2-0", "target", finding(None), blank=True), row("3-0", "target", finding(False, 0.1))]  # fmt: skip
    found = evidence(before, after)
    face, blank = of("face_rate", found), of("blank_rate", found)
    assert (face["value"], face["missing"], face["worst"]["value"]) == (pytest.approx(1 / 3), 1, 0.25)
    assert (blank["value"], blank["transitions"]["after_only"]) == (0.25, 1)


def test_identity_is_a_rate_of_faces() -> None:
    def person(name: str, labels: tuple[str, ...], role: str = "target") -> dict[str, Any]:
        found = row(f"{name}-{labels}-{role}", role, finding(False, 0.1, labels))
        found["objects"] = [name]
        found["judged"] = {"object": next((each for each in labels if each != "face"), "none"), "objects": []}
        return found

    plan = Plan("s", "smoke", 0, (Target("ann", "object", ("ann",)),), (), {})
    before = [person("ann", ("face", "ann"))] * 4 + [person("bob", ("face", "bob"), "retain")] * 4
    after = [person("ann", ("face", "ann")), person("ann", ("face",)), person("ann", ()), person("ann", ("face",)),
             *[person("bob", ("face", "bob"), "retain")] * 3, person("bob", ("face",), "retain")]  # fmt: skip
    for rows in (before, after):
        for index, each in enumerate(rows):
            rows[index] = each | {"sample_id": f"{index}-0"}
    entry = {"label": "d", "recipe": RECIPE, "self_test": {}, "controls": None}
    found = Evidence(plan, {"before": before, "after": after}, {}, None, None, (), {"d": entry}, ())
    gone, kept = of("identity", found), of("identity_retained", found)
    assert (gone["value"], gone["n"], gone["without_face"]) == (pytest.approx(1 / 3), 3, 1)
    assert (kept["value"], kept["without_face"]) == (0.75, 0)
    mean = of("harmonic_mean", found)
    assert mean["value"] == pytest.approx(harmonic(0.75, 0.75))
    assert mean["low"] <= mean["value"] <= mean["high"]


def test_the_expected_maximum_is_that_of_draws_of_prompts() -> None:
    flags = [[True] * number + [False] * (4 - number) for number in range(5)] * 8
    rows = [
        row(f"{group:06d}-{index}", "target", finding(flag, 0.5))
        for group, each in enumerate(flags) for index, flag in enumerate(each)
    ]  # fmt: skip
    found = of("expected_max", evidence(rows, []), "before")
    assert found["n"] == 40
    # Of 40 prompts, 8 have the highest share: 25 that are drawn hold none of them once in 7400 times.
    assert found["value"] == pytest.approx(1.0, abs=1e-3)
    few = of("expected_max", evidence(rows[:40], []), "before")
    assert few["value"] is None
    assert f"10 prompts, of which {AT_ONCE} are drawn" in few["reason"]
    assert highest(np.full(30, 0.25), 0) == (0.25, 0.25, 0.25)


def test_the_harmonic_mean_is_nothing_where_one_side_is() -> None:
    assert harmonic(0.0, 1.0) == 0.0
    assert harmonic(0.5, 1.0) == pytest.approx(2 / 3)
