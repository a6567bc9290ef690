"""Pipelines of every family with a drop-in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from erasure import backbones
from erasure.pipelines import pipeline_class

FAMILIES = tuple(family.family for family in backbones.FAMILIES)
"""Every known family: each has a tiny model and a drop-in."""


@pytest.fixture(scope="session")
def originals(tiny_models: Any) -> dict[str, Any]:
    """A tiny pipeline of every family with a drop-in: read them, never change them."""
    return {family: tiny_models[family]() for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family with a drop-in."""
    return request.param


@pytest.fixture
def stock(originals: dict[str, Any], family: str) -> Any:
    """A pipeline of the family that the test may change."""
    return copy.deepcopy(originals[family])


@pytest.fixture(params=["stock", "drop-in"])
def route(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Makes the pipeline that draws of one with an erasure: the same, or a drop-in on its networks."""

    def make(pipe: Any) -> Any:
        if request.param == "stock":
            return pipe
        made = pipeline_class(type(pipe).__name__).from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        return made

    return make
