"""Several concepts erased at once: the sets that are drawn, and their table."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasure.assets.build import several
from erasure.assets.world import OBJECTS, STYLES
from erasure.eval.results import Results


def test_sets_are_seeded_distinct_and_of_the_world() -> None:
    sets = several.draws(5, 20)
    assert len({frozenset(names) for names in sets}) == 20
    order = [*OBJECTS, *STYLES]
    for names in sets:
        assert len(set(names)) == 5
        assert list(names) == sorted(names, key=order.index)
    assert several.draws(5, 20) == sets
    assert several.draws(5, 7) == sets[:7]
    assert several.draws(5, 20, seed=1) != sets
    assert all(set(STYLES) - set(names) for names in several.draws(27, 8)), "some style is left to be measured"


def test_more_sets_than_there_are_cannot_be_drawn() -> None:
    assert len(several.draws(1, 29)) == 29
    with pytest.raises(ValueError, match="found 29"):
        several.draws(1, 30)


def test_a_set_that_is_measured_already_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = several.draws(5, 4)
    for names in sets[1::2]:
        folder = several.folder_of(tmp_path, "itd", names)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(several.erasure, "erase", refuse)
    several.measure(tmp_path, "itd", sets, "smoke", (1, 2))
    with pytest.raises(AssertionError, match="made again"):
        several.measure(tmp_path, "itd", sets, "smoke", (0, 2))


def test_the_table_has_means_and_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured:
        def __init__(self, value: float) -> None:
            self.value = value

        def get(self, rate: str) -> dict[str, float]:
            return {"value": self.value if rate in ("UA", "AA") else 1.0}

    values = iter([1.0, 0.5, 0.9])
    monkeypatch.setattr(Results, "load", lambda path: Measured(next(values)))
    pair, three = several.rows(Path("out"), "itd", [("cat", "dog"), ("cat", "ink"), ("cat", "dog", "ink")])
    assert (pair["concepts"], pair["sets"], pair["least"], pair["least_of"]) == (2, 2, 0.5, "cat, ink")
    assert pair["UA"] == {"value": 0.75, "low": 0.5, "high": 1.0}
    rates = {rate: {"value": 0.9 if rate in ("UA", "AA") else 1.0} for rate in several.RATES}
    assert three == {"concepts": 3, "sets": 1, **rates, "least": 0.9, "least_of": several.ONLY}
