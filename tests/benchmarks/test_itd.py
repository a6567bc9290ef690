"""The benchmark of feature edits, with few concepts and a small dictionary."""

from __future__ import annotations

import json

import pytest

from benchmarks import itd
from benchmarks.__main__ import main


def test_bench_of_features(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("CONCEPTS", (1, 3)), ("WIDTH", 32), ("FEATURES", 20), ("D_SAE", 64), ("K", 4), ("BATCH", 48)):
        monkeypatch.setattr(itd, name, value)
    assert main(["itd", "--repeats", "1", "--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["concepts"] for row in found["images"]] == [1, 3]
    assert all(row["time_ratio"] > 0 for row in found["images"])
    assert found["images"][1]["bytes"] > found["images"][0]["bytes"]
    assert found["edit"]["edit, ms"] > 0
    assert set(found["training"]) == {"sparse", "dense"}
    capsys.readouterr()
    assert main(["itd", "--repeats", "0"]) == 2
