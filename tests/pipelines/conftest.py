"""A tiny SDXL pipeline beside the tiny pipeline of all tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_xl_original(tiny_models: Any) -> Any:
    """A `StableDiffusionXLPipeline` with random weights: read it, never change it."""
    return tiny_models["stable-diffusion-xl"]()


@pytest.fixture(params=["sd", "sdxl"])
def stock(request: pytest.FixtureRequest, tiny_pipe_original: Any, tiny_xl_original: Any) -> Any:
    """A tiny text-to-image pipeline of each UNet family, that the test may change."""
    return copy.deepcopy(tiny_pipe_original if request.param == "sd" else tiny_xl_original)
