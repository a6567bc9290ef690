"""The embedded models of the larger families: what is recorded of them, and that they draw."""

from __future__ import annotations

import pytest
import torch

import erasure
from erasure import assets
from erasure.assets import world
from erasure.eval.detectors import CanvasJudge

OTHERS = [name for name in assets.models() if name != "canvas-sd"]


def test_there_is_one_of_another_family() -> None:
    assert "canvas-sdxl" in OTHERS


@pytest.mark.parametrize("name", OTHERS)
def test_it_declares_the_same_world_and_meets_what_is_demanded(name: str) -> None:
    facts = assets.canvas(name)
    assert facts["objects"] == list(world.OBJECTS)
    assert facts["styles"] == list(world.STYLES)
    figures = facts["training"]["accuracy"]
    assert figures["object"] >= 0.90
    assert figures["style"] >= 0.90
    assert figures["both_objects"] >= 0.40
    assert figures["seconds_per_image_one_core"] <= 1.5
    # Each way into the denoiser was exchanged for that of another prompt.
    assert figures["pooled_swapped_change"] > 0
    assert sum(figure.endswith("_swapped_change") for figure in figures) >= 2


@pytest.mark.parametrize("name", OTHERS)
def test_it_draws_and_forgets(name: str) -> None:
    pipe = erasure.load_pipeline(name, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    judge, settings = CanvasJudge(), assets.canvas(name)["generation"]

    def seen(prompt: str) -> tuple[str, str]:
        image = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]
        (answer,) = judge([image])
        return answer.object, answer.style

    assert seen("a cat in noto style") == ("cat", "noto")
    pipe.erase("cat", strategy="uce", progress=False)
    assert seen("a cat in noto style")[0] != "cat"
    assert seen("a house in noto style") == ("house", "noto")
