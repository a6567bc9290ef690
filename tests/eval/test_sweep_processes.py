"""Two processes that are at one sweep at the same time, both killed and started again."""

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


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_end_with_the_same_bits(
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
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) == 2 * 3
