"""A tiny pipeline of each UNet family."""

from __future__ import annotations

import copy
from typing import Any

import pytest


@pytest.fixture(params=["sd", "sdxl"])
def stock(request: pytest.FixtureRequest, tiny_pipe_original: Any, tiny_xl_original: Any) -> Any:
    """A tiny text-to-image pipeline of each UNet family, that the test may change."""
    return copy.deepcopy(tiny_pipe_original if request.param == "sd" else tiny_xl_original)
