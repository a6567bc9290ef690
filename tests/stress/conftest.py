"""What the stress tests share: the erasures, made once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from diffusers.utils import logging

import erasure

from .model import Kit, make_erasures


@pytest.fixture(scope="session")
def kit(tiny_pipe_original: Any) -> Kit:
    """Small erasures of every kind for the tiny pipeline."""
    pipe = copy.deepcopy(tiny_pipe_original)
    made = make_erasures(pipe)
    made["uce"] = erasure.erase(pipe, "dog", "uce", vocabulary=0, attach=False, progress=False)
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
