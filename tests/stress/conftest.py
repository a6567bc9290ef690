"""What the stress tests share: the erasures, made once."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import erasure

from .model import Kit, make_erasures


@pytest.fixture(scope="session")
def kit(tiny_pipe_original: Any) -> Kit:
    """Small erasures of every kind for the tiny pipeline."""
    pipe = copy.deepcopy(tiny_pipe_original)
    made = make_erasures(pipe)
    made["uce"] = erasure.erase(pipe, "dog", "uce", vocabulary=0, attach=False, progress=False)
    return Kit(made)
