"""Strategies compared on the embedded models of all families: what is made, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erasure.assets.build import across, table
from erasure.backbones import Backbone
from erasure.eval.statistics import Interval


def test_what_is_compared_is_among_what_is_reported() -> None:
    assert set(across.NAMES) <= {concept.target for concept in table.measured()}


def test_a_strategy_that_does_not_work_is_not_run_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Backbone, "lacks", lambda self, need: f"no {need} here" if need == "trajectories" else "")
    monkeypatch.setattr(
        table, "measure", lambda out, strategies, *rest, **of: asked.append((out.name, strategies, of))
    )
    reasons = across.measure(tmp_path, ("canvas-sd",), ("uce", "esd"), "smoke", (0, 1))
    assert reasons == {("canvas-sd", "esd"): "no trajectories here"}
    assert asked == [("canvas-sd", ("uce",), {"model": "canvas-sd", "only": across.NAMES})]

    one = {rate: Interval(1.0, 0.5, 1.0) for rate in table.RATES}
    monkeypatch.setattr(table, "rows", lambda out, strategies, of: [{**one, "seconds": 1.0, "kB": 2.0}])
    lines = across.markdown(tmp_path, ("canvas-sd",), ("uce", "esd"), reasons).splitlines()
    assert lines[2:] == [
        "| `uce` | `canvas-sd` | " + " | ".join(["1.000 (0.50-1.00)"] * 4) + " | 1.0 | 2 |",
        "| `esd` | `canvas-sd` | no trajectories here | | | | | |",
    ]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
