"""The benchmark of attention control, on small layers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import attention
from benchmarks.__main__ import main


def test_bench_attention(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small, and FLOPs at the timing width: full ones take minutes.
    monkeypatch.setitem(attention.LAYOUTS, "sd15", (32, 64, 64, 64))
    monkeypatch.setitem(attention.LAYOUTS, "quarter", (32, 64, 64, 64))
    assert main(["attention", "--tokens", "256", "--side", "32", "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer"]["largest_difference"] < 1e-4
    assert 0 < found["shared_trunk"]["flops"] < 1
    assert 0 < found["early_exit"]["flops"] < 1
    assert found["layer"]["memory_ratio"] > 1
