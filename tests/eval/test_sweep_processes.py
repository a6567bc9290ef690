"""Two processes that are at one sweep at the same time, both killed and started again.

Which process finds which image in the cache depends on time alone, and with it how the rest falls into batches. What a
network gives for an image differs by rounding between batches of other sizes, so that numbers are compared to that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure.eval.sweeps.plan import SweepPlan
from erasure.eval.sweeps.runner import outcomes_of, sweep
from tests.eval.conftest import WORLD
from tests.eval.test_sweeps import contents

FILE = """
models = [{model}]
concepts = ["cat", "dog"]
methods = [{{ strategy = "uce", options = {{ vocabulary = 0 }} }}]
suites = ["canvas"]
size = "smoke"
judge = "looking:judge"
"""
JUDGE = """
from types import SimpleNamespace

def judge(images):
    means = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
    return [
        SimpleNamespace(
            object=("cat", "dog", "gun")[(red + green) // 8 % 3], objects=(), style=("noto", "ink")[blue // 8 % 2],
            shape=("cat", "dog", "gun")[red // 8 % 3], object_scores={"cat": 0.5},
        )
        for red, green, blue in means
    ]

judge.version = "mean colours"
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """Begin the sweep of a folder in a process of its own, with a cache that no other test fills."""
    paths = os.pathsep.join([str(folder), *(path for path in sys.path if path)])
    own = {
        "PYTHONPATH": paths,
        "ERASURE_CACHE": str(folder / "cache-of-two"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    words = [sys.executable, "-m", "erasure", "sweep", "sweep.toml", "--out", "killed", "--device", "cpu", "--json"]
    return subprocess.Popen(
        words, cwd=folder, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(true: Any, processes: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 600
    while not true():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def read(folder: Path) -> dict[str, Any]:
    """Read what counts of a sweep's folder, by file: rows and metrics as data, weights as bytes."""
    return {
        name: data if name.endswith(".safetensors") else json.loads(data) for name, data in contents(folder).items()
    }


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """List where contents of files are not the same; numbers may differ by 1e-4, or by a thousandth of themselves."""
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        return [line for key in wanted for line in differences(found[key], wanted[key], f"{where}/{key}")]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [line for index, (one, other) in pairs for line in differences(one, other, f"{where}/{index}")]
    if isinstance(found, float) and isinstance(wanted, float):
        return [] if found == pytest.approx(wanted, rel=1e-3, abs=1e-4) else [f"{where}: {found}, not {wanted}"]
    return [] if found == wanted else [f"{where}: {str(found)[:200]}, not {str(wanted)[:200]}"]


def test_a_difference_is_seen() -> None:
    row = {"clip_score": 0.5, "object": "cat", "n": 4}
    rows = {"samples.jsonl": [row], "erasure.safetensors": b"one"}
    assert differences(rows | {"samples.jsonl": [row | {"clip_score": 0.5 + 1e-7}]}, rows) == []
    for other in ({"clip_score": 0.502}, {"object": "dog"}, {"n": 5}, {"more": 0}, {"clip_score": None}):
        assert len(differences(rows | {"samples.jsonl": [row | other]}, rows)) == 1
    assert differences(rows | {"erasure.safetensors": b"two"}, rows)
    assert differences(rows | {"samples.jsonl": []}, rows)


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_end_with_the_same_numbers(
    tiny_pipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_pipe_folder, tmp_path / "world")
    (tmp_path / "world" / "canvas.json").write_text(json.dumps(WORLD))
    (tmp_path / "sweep.toml").write_text(FILE.format(model=json.dumps(str(tmp_path / "world"))))
    (tmp_path / "looking.py").write_text(JUDGE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    both = [start(tmp_path) for _ in range(2)]
    try:
        # Each is at a cell of its own, and has drawn something.
        until(lambda: len(list(killed.glob("cells/**/samples.jsonl"))) >= 2, both)
        at_work = {path.parents[1] for path in killed.glob("cells/**/samples.jsonl")}
        done = list(killed.rglob("cell.json"))
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert len(at_work) == 2
    assert len(done) < 2

    both = [start(tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path / "cache"))
    plan = SweepPlan.read(tmp_path / "sweep.toml")
    assert [outcome.state for outcome in outcomes_of(plan, killed)] == ["done"] * 2
    sweep(plan, out=whole)
    found, wanted = read(killed), read(whole)
    assert differences(found, wanted) == []
    assert len(wanted) == 2 * 3
