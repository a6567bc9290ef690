"""The sweeps whose tables stand in docs: what they are of, and how their tables are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasure.assets.build import across, everything, sweep, table
from erasure.assets.world import STYLES
from erasure.eval.comparison import Comparison


def test_what_is_reported_is_what_chose_no_defaults() -> None:
    measured = [concept.target for concept in table.measured()]
    for name in ("table", "unseen"):
        plan = sweep.plan(name)
        assert list(plan.concepts) == measured
        assert {group: list(names) for group, names in plan.groups.items()} == table.groups()
    assert set(sweep.plan("across").concepts) <= set(measured)
    assert len(across.SHOWN) == 2 * len(STYLES)


def test_a_size_that_is_given_is_that_of_everything() -> None:
    assert {measure.size for measure in sweep.plan("across", "smoke").measures} == {"smoke"}
    assert {measure.size for measure in sweep.plan("across").measures} == {"full"}


def test_shares_of_the_table_are_run_ahead_of_it(tmp_path: Path) -> None:
    groups = everything.steps(tmp_path)
    names = [[step.name for step in group] for group in groups]
    assert [f"table-{number}" in names[1] for number in range(1, everything.SHARES + 1)] == [True] * everything.SHARES
    assert "table" in names[2]


def test_where_an_erasure_lies_is_where_the_sweep_puts_it(tmp_path: Path) -> None:
    cells = sweep.plan("table").cells
    found = sweep.erasure_of(tmp_path, "itd", "dog")
    assert found in {tmp_path / cell.folder / sweep.ERASURE for cell in cells}


def test_the_table_has_a_row_for_each_method_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"value": 1.0, "low": 0.5, "high": 1.0}
    done = {"name": "uce", "variant": "after", "model": "canvas-sd", "cells": dict.fromkeys(sweep.RATES, cell),
            "missing": {}, "seconds": 1.0, "size_bytes": 2000}  # fmt: skip
    refused = {**done, "model": "canvas-flux", "cells": {}, "missing": {"results": "no trajectories here"}}
    rows = ({**done, "variant": "before"}, {**done, "name": "hirm"}, done, refused)
    monkeypatch.setattr(sweep, "table_of", lambda plan, out: Comparison(sweep.RATES, rows))
    lines = sweep.markdown(sweep.plan("across"), tmp_path, lambda row: f"`{row['model']}`", "model").splitlines()
    assert lines[2:] == [
        "| `uce` | `canvas-sd` | " + " | ".join(["1.000 (0.50-1.00)"] * 4) + " | 1.0 | 2 |",
        "| `uce` | `canvas-flux` | no trajectories here | | | | | |",
        "| `hirm` | `canvas-sd` | " + " | ".join(["1.000 (0.50-1.00)"] * 4) + " | 1.0 | 2 |",
    ]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
