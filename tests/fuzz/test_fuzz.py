"""Damaged files of every kind, quickly; by hand more: `python tests/fuzz 2000`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="needs alarms, pipes and limits of memory")
def test_damaged_files_are_refused_by_name() -> None:
    """In a process of its own: its memory is limited, and a crash of it is a failure like any other."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz"), "240"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
