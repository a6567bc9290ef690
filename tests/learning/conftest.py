"""What tests of learning share: pictures, and concepts of a tiny pipeline."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from erasure.assets.scenes import Scene, render
from erasure.learning import LearnedConcepts, learn_concepts

QUICK: dict[str, object] = {
    "steps": 3, "batch": 2, "vectors": 2, "prior_batch": 1, "prior_prompts": 1, "prior_steps": 2, "progress": False,
}  # fmt: skip
"""Options of a training that takes a second."""


def picture(*things: str, background: str = "white") -> Image.Image:
    """A picture of new things."""
    return Image.fromarray(render(Scene(things, "noto", background)).image)


@pytest.fixture(scope="session")
def concepts(session_pipe: Any) -> LearnedConcepts:
    """`<logo>`, learned with the tiny pipeline; read it, never change it."""
    return learn_concepts(session_pipe, picture("robot"), "<logo>", masks=[mask()], load=False, **QUICK)


@pytest.fixture(scope="session")
def session_pipe() -> Any:
    """A tiny pipeline that no test changes."""
    from tests.models import make_tiny_pipe

    return make_tiny_pipe()


def mask(thing: int = 0, *things: str) -> Image.Image:
    """The true mask of a thing in a picture of several; of a robot alone when no things are named."""
    return Image.fromarray(render(Scene(things or ("robot",), "noto", "white")).masks[thing])
