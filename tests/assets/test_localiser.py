"""How well things are found by words: what is asked for, and the picture of it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from erasure.assets.build import localiser
from erasure.errors import MaskError
from erasure.pipelines import StableDiffusionErasurePipeline


def test_every_word_is_asked_for_once_and_refusals_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[tuple[int, str, tuple[str, ...]]] = Counter()

    def localize(self: Any, image: Any, word: str, *, others: tuple[str, ...] = ()) -> SimpleNamespace:
        asked[hash(image.tobytes()), word, others] += 1

        def of_words() -> None:
            if word == "cat":
                raise MaskError("no cat is ever found")

        return SimpleNamespace(of_words=of_words)

    monkeypatch.setattr(StableDiffusionErasurePipeline, "localize", localize)
    found = localiser.refusals(every=12, absent=3)
    scenes = 4
    assert {kind: len(answers) for kind, answers in found.items()} == {
        "alone": scenes, "absent, one shown": 3 * scenes, "beside another": 2 * scenes,
        "beside another that is named": 2 * scenes, "absent, one of two named": 2 * scenes,
    }  # fmt: skip
    assert max(asked.values()) == 1
    cats = sum(word == "cat" for _, word, _ in asked)
    assert sum(sum(answers) for answers in found.values()) == cats > 0
    assert localiser.refused({"alone": [True, False]}).splitlines()[2].endswith("| 1 of 2 |")


def test_overlap_is_the_common_area_over_that_of_both() -> None:
    first, second = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    assert localiser.overlap(first, second) == 1
    first[:, :2], second[:2] = True, True
    assert localiser.overlap(first, second) == pytest.approx(4 / 12)


def test_the_picture_has_a_column_for_each_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localiser, "SHOWN", localiser.SHOWN[4:5])
    page = localiser.picture()
    step = localiser.CELL + localiser.GAP
    assert page.size == (localiser.MARGIN + step, 32 + 5 * step)
    pixels = torch.from_numpy(np.array(page)).int()
    centres = [32 + step * row + localiser.CELL // 2 for row in range(5)]
    scene, _, gone, found, by_name = (pixels[y, localiser.MARGIN + localiser.CELL // 2] for y in centres)
    assert (scene != found).any(), "two masks have two colours"
    # The rocket is gone and its background, purple, is in its place.
    background = pixels[32 + 4, localiser.MARGIN + 4]
    assert (gone - background).abs().max() < 12
    assert (by_name - background).abs().max() < 12
