"""The measurement of learned concepts: which pictures, and what counts as learned apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from erasure.assets import novel
from erasure.assets.build import learning
from erasure.assets.build.measured import figure
from erasure.errors import EvaluationError
from erasure.eval.detectors import NewcomersAnswer
from erasure.eval.statistics import wilson


def test_pairs_are_two_things_each_and_show_them_all() -> None:
    made = learning.pairs(2 * len(novel.THINGS))
    assert all(len(set(pair.things)) == 2 for pair in made)
    assert {name for pair in made for name in pair.things} == set(novel.THINGS)
    assert len({frozenset(pair.things) for pair in made[: len(novel.THINGS)]}) == len(novel.THINGS)
    for pair in made:
        assert pair.scene.masks.shape[0] == 2
        assert pair.scene.masks.any((1, 2)).all()
        assert not (pair.scene.masks[0] & pair.scene.masks[1]).any()


def test_overlap_is_that_of_plain_counting() -> None:
    first, second = np.array([[True, True], [False, False]]), np.array([[True, False], [True, False]])
    assert learning.overlap(first, second) == pytest.approx(1 / 3)
    assert learning.overlap(first, first) == 1
    assert learning.overlap(first & ~first, first & ~first) == 0


def test_a_thing_is_apart_where_it_is_seen_most_and_the_other_not() -> None:
    assert learning.is_apart(NewcomersAnswer("robot", ("robot",), {}), "robot", "cactus")
    assert not learning.is_apart(NewcomersAnswer("robot", ("robot", "cactus"), {}), "robot", "cactus")
    assert not learning.is_apart(NewcomersAnswer("gem", ("robot",), {}), "robot", "cactus")


def figures(first: str, second: str) -> learning.PairFigures:
    things = (
        learning.ThingFigures(thing=first, mask=0.8, drawn=1.0, erased=1.0, kept=1.0),
        learning.ThingFigures(thing=second, mask=0.9, drawn=0.5, erased=0.5, kept=0.5),
    )
    return learning.PairFigures(things=things, both=0.1, known=0.75, seconds=30.0, size_bytes=600_000)


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(folder: Path, *_: object) -> learning.PairFigures:
        asked.append(folder.name)
        return figures(*folder.name.split("-"))

    monkeypatch.setattr(learning, "measure", measure)
    learning.measured(tmp_path, 1, 2, "uce")
    found = learning.measured(tmp_path, 2, 2, "uce")
    assert learning.measured(tmp_path, 1, 2, "uce") == found[:1]
    assert len(asked) == len(set(asked)) == 2
    assert ["-".join(each.thing for each in pair.things) for pair in found] == asked


def test_figures_that_are_damaged_are_refused(tmp_path: Path) -> None:
    (tmp_path / "learning.json").write_text('[{"things": ["robot", "cactus"]}]')
    with pytest.raises(EvaluationError, match=r"learning.json"):
        learning.measured(tmp_path, 1, 2, "uce")


def test_rows_are_the_shares_of_images() -> None:
    pair = figures("robot", "cactus")
    robot, cactus, every = learning.rows([pair], 10)
    assert robot["thing"] == "robot"
    assert cactus["drawn"] == figure(wilson(5, 10), 10)
    assert "both" not in cactus, "a picture's figures stand once"
    assert robot["known"] == figure(wilson(18, 24), 24)
    assert every == {
        "thing": "all", "mask": 0.85, "both": robot["both"], "known": robot["known"], "seconds": 30.0, "kB": 600.0,
        **{name: figure(wilson(15, 20), 20) for name in ("drawn", "erased", "kept")},
    }  # fmt: skip
