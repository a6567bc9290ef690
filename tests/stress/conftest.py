"""What the stress tests share: the erasures, made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers.utils import logging

import erasure
from erasure import ErasureManager
from tests.copies import copied

from .crew import ATTACHED, A
from .looks import drop_in, give_world, one_thread
from .model import Kit, make_erasures


@pytest.fixture(scope="session")
def kit(tiny_pipe_original: Any) -> Kit:
    """Small erasures of every kind for the tiny pipeline."""
    pipe = copied(tiny_pipe_original)
    made = make_erasures(pipe)
    made["uce"] = erasure.erase(pipe, "dog", "uce", vocabulary=0, saved_as="lora", attach=False, progress=False)
    return Kit(made)


@pytest.fixture(scope="session", autouse=True)
def no_bars() -> Iterator[None]:
    """Thousands of saved and loaded pipelines need no progress bars, nor warnings of how they are cast."""
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


@pytest.fixture
def tight() -> Iterator[None]:
    """Torch on one thread, and Python changing threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with one_thread():
        yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="session")
def attached(kit: Kit, tiny_pipe_original: Any) -> Any:
    """A drop-in pipeline with every erasure attached in state A: copy it, never change it."""
    with one_thread():
        made = drop_in(copied(tiny_pipe_original))
        for kind in ATTACHED:
            ErasureManager(made).add(kit.erasures[kind], kind, A[kind])
    return made


@pytest.fixture
def pipe(attached: Any, tmp_path: Path) -> Any:
    """A drop-in pipeline with every erasure attached in state A, whose model has a world."""
    made = copied(attached)
    give_world(made, tmp_path / "world")
    return made
