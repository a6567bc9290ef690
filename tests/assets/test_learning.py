"""The measurement of learned concepts: which pictures, and what counts as learned apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from erasure.assets import novel
from erasure.assets.build import learning
from erasure.assets.build.measured import figure
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


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(folder: Path, *_: object) -> dict[str, object]:
        asked.append(folder.name)
        return {"things": folder.name}

    monkeypatch.setattr(learning, "measure", measure)
    learning.measured(tmp_path, 1, 2, "uce")
    assert len(learning.measured(tmp_path, 2, 2, "uce")) == 2
    assert len(learning.measured(tmp_path, 1, 2, "uce")) == 1
    assert len(asked) == len(set(asked)) == 2
    assert [row["things"] for row in json.loads((tmp_path / "learning.json").read_text())] == asked


def test_rows_are_the_shares_of_images() -> None:
    pair = {
        "things": ["robot", "cactus"], "masks": [0.8, 0.9], "cost": {"seconds": 30.0}, "bytes": 600_000,
        "both drawn": 0.1, "known drawn": 0.75,
        **{f"<one> {name}": 1.0 for name in ("drawn", "erased", "kept")},
        **{f"<two> {name}": 0.5 for name in ("drawn", "erased", "kept")},
    }  # fmt: skip
    robot, cactus, every = learning.rows([pair], 10)
    assert robot["thing"] == "robot"
    assert cactus["drawn"] == figure(wilson(5, 10), 10)
    assert "both" not in cactus, "a picture's figures stand once"
    assert robot["known"] == figure(wilson(18, 24), 24)
    assert every == {
        "thing": "all", "mask": 0.85, "both": robot["both"], "known": robot["known"], "seconds": 30.0, "kB": 600.0,
        **{name: figure(wilson(15, 20), 20) for name in ("drawn", "erased", "kept")},
    }  # fmt: skip
