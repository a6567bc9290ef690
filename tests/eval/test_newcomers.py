"""What tells new things apart: on pictures whose truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from erasure.assets import novel
from erasure.assets.scenes import Scene, render
from erasure.errors import ArtifactError
from erasure.eval.detectors import NewcomersJudge


def test_new_things_are_told_apart_and_from_known_ones() -> None:
    judge, known = NewcomersJudge(), ["cat", "guitar", "apple", "castle"]
    names = [*novel.THINGS, *known]
    found = judge([Image.fromarray(render(Scene((name,), "noto", "pink")).image) for name in names])
    assert [seen.thing for seen in found] == names
    assert not any(set(seen.things) & set(novel.THINGS) for seen in found[-len(known) :])
    assert judge([]) == []


def test_two_new_things_are_both_found() -> None:
    (seen,) = NewcomersJudge()([Image.fromarray(render(Scene(("robot", "gem"), "noto", "yellow")).image)])
    assert set(seen.things) == {"robot", "gem"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        NewcomersJudge(tmp_path)
