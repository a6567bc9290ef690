"""How often things stand where a layout asks for them: what is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure.assets.build import layouts
from erasure.errors import EvaluationError
from erasure.pipelines import StableDiffusionAStarPipeline, StableDiffusionErasurePipeline


@pytest.mark.parametrize(
    ("found", "rate"),
    [
        (lambda layout: torch.stack(layout), 1.0),
        (lambda layout: torch.stack(layout[::-1]), 0.0),
        (lambda layout: torch.stack(layouts.sides()), 0.5),
        (lambda layout: torch.stack([layout[0], torch.zeros_like(layout[1])]), 0.0),
    ],
    ids=["each on its side", "each on the other", "in the order of the words", "one not found"],
)
def test_sides_are_counted(monkeypatch: pytest.MonkeyPatch, found: Any, rate: float) -> None:
    def draw(self: Any, prompt: str, *, subjects: list[str], layout: list[torch.Tensor], **settings: Any) -> Any:
        assert all(subject in prompt for subject in subjects)
        return SimpleNamespace(images=[(subjects, layout)])

    def localize(self: Any, image: Any, words: list[str]) -> Any:
        assert words == image[0]
        return SimpleNamespace(masks=found(image[1])[None])

    monkeypatch.setattr(StableDiffusionAStarPipeline, "__call__", draw)
    monkeypatch.setattr(StableDiffusionErasurePipeline, "localize", localize)
    monkeypatch.setattr(layouts.CanvasJudge, "__call__", lambda self, images: [SimpleNamespace(objects=images[0][0])])
    both, right = layouts.measure(3)
    assert (both.value, right.value) == (1.0, rate)
    assert layouts.described(both, right).startswith("1.00 (0.61-1.00) of the images show both")


def test_nothing_to_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        StableDiffusionAStarPipeline, "__call__", lambda self, *args, **settings: SimpleNamespace(images=[None])
    )
    monkeypatch.setattr(layouts.CanvasJudge, "__call__", lambda self, images: [SimpleNamespace(objects=())])
    with pytest.raises(EvaluationError):
        layouts.measure(1)
