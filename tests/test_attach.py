"""The same edits under two names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.errors import TwiceAttachedWarning

QUICK: dict[str, dict[str, Any]] = {"uce": {}, "hirm": {"steps": 3}}


@pytest.mark.parametrize("strategy", QUICK)
def test_the_same_edits_attached_twice_are_told(tiny_pipe: Any, tmp_path: Path, strategy: str) -> None:
    cat, options = Concept("cat", anchor="dog"), QUICK[strategy]
    made = erasure.erase(tiny_pipe, cat, strategy, progress=False, name="one", **options)
    folder = made.save(tmp_path / "made")
    again = erasure.erase(tiny_pipe, cat, strategy, progress=False, attach=False, **options)
    manager = ErasureManager(tiny_pipe)
    for name, source in (("memory", made), ("made again", again), ("disk", folder), ("read", Erasure.load(folder))):
        with pytest.warns(TwiceAttachedWarning, match="the same edits as 'one', which is attached already.*twice"):
            manager.load(source, name.replace(" ", "-"))
    assert manager.verify() > 0


def test_other_edits_are_attached_without_a_word(tiny_pipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TwiceAttachedWarning)
        for word in ("cat", "dog"):
            for strategy, options in QUICK.items():
                erasure.erase(tiny_pipe, Concept(word, anchor="house"), strategy, progress=False, **options)
        manager = ErasureManager(tiny_pipe)
        manager.delete("cat-uce")
        erasure.erase(tiny_pipe, Concept("cat", anchor="house"), "uce", progress=False)
