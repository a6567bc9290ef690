"""`erasure stress` on the embedded model: a run, its table and page, comparison, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erasure.cli.main import main
from erasure.cli.stress import by_condition, failed_controls


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An erasure of "cat" from the embedded model."""
    folder = tmp_path_factory.mktemp("erasures") / "cat"
    assert main(["erase", "uce", "--model", "canvas-sd", "--concept", "cat", "--out", str(folder)]) == 0
    return str(folder)


@pytest.fixture
def stopped(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must stop with exit code 2, and give its one line."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        code = main(["stress", *map(str, arguments)])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        (error,) = said.err.splitlines()
        assert error.startswith("erasure: error: ")
        return error

    return run


def test_stress_runs_resumes_and_compares(cat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["stress", "merge", "--model", "canvas-sd", "--erasure", cat, "--size", "smoke", "--retained", "1"]
    out = tmp_path / "merge"
    assert main([*start, "--shares", "0.5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "merge_0.5" in said
    assert "verdict" in said
    assert "report.html" in said
    assert (out / "report.html").is_file()
    kept = (out / "samples.jsonl").read_bytes()
    assert main([*start, "--shares", "0.5", "--out", str(out), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert (out / "samples.jsonl").read_bytes() == kept
    found = {(row["name"], row["variant"]): row for row in metrics}
    assert found["concept_shown", "before"]["value"] == 1
    assert found["concept_shown", "after"]["value"] == 0
    assert found["recovered", "merge_0.5"]["verdict"] in ("returns", "undecided", "no return seen")
    other = tmp_path / "other"
    assert main([*start, "--shares", "0.25", "--out", str(other)]) == 0
    capsys.readouterr()
    assert main(["compare", str(out), str(out)]) == 0
    capsys.readouterr()
    assert main(["compare", str(out), str(other)]) == 2
    assert "stress.shares" in capsys.readouterr().err


def test_bad_usage_is_one_line(cat: str, tmp_path: Path, stopped: Any) -> None:
    out = tmp_path / "out"
    start = ["merge", "--model", "canvas-sd", "--out", out]
    assert "Did you mean 'quantise'" in stopped("quantize", "--model", "canvas-sd", "--out", out)
    assert "name the stress test first" in stopped("--model", "canvas-sd")
    assert "--out" in stopped("merge", "--model", "canvas-sd")
    assert "nothing to put under stress" in stopped(*start)
    assert "huge" in stopped(*start, "--erasure", cat, "--size", "huge")
    assert "'shares'" in stopped(*start, "--erasure", cat, "--shares", "1.5")
    assert "two ways to say who looks" in stopped(*start, "--erasure", cat, "--judge", "a:b", "--detector", "nsfwjs")
    assert "unknown detector" in stopped(*start, "--erasure", cat, "--detector", "nsfw")
    assert "unknown suite" in stopped(*start, "--erasure", cat, "--suite", "i3p")
    assert "'formats'" in stopped(
        "quantise", "--model", "canvas-sd", "--erasure", cat, "--out", out, "--backend", "bitsandbytes"
    )
    assert not out.exists()


def test_the_table_has_a_line_for_each_condition() -> None:
    shown = {"value": 0.5, "low": 0.2, "high": 0.8, "concept": "cat"}
    rows = [
        {"name": "concept_shown", "variant": "after", **shown},
        {"name": "concept_shown", "variant": "int8", **shown},
        {"name": "retained_seen", "variant": "int8", **shown},
        {"name": "recovered", "variant": "int8", **shown, "verdict": "returns"},
        {"name": "recovered", "variant": "nf4", "concept": "cat", "value": None},
        {"name": "S50", "variant": "relearned", **shown},
    ]
    columns, lines = by_condition(rows)
    assert columns == ["condition", "of", "concept_shown", "retained_seen", "recovered", "verdict"]
    value = "0.500 [0.200, 0.800]"
    assert lines == [
        ["after", "cat", value, "-", "-", "-"],
        ["int8", "cat", value, value, value, "returns"],
        ["nf4", "cat", "-", "-", "-", "no verdict"],
    ]


def test_a_control_that_fails_is_said() -> None:
    row = {"name": "control_changed", "variant": "stock_nf4", "value": 0.1, "recipe": {"metric": "share of images"}}
    assert failed_controls([row | {"holds": True}, {"name": "UA", "variant": "after"}]) == []
    (line,) = failed_controls([row | {"holds": False}])
    assert line == "Control control_changed of stock_nf4 fails: share of images: 10 %."
