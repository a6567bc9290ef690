"""Requests one after the other: their order, what of them is on disk, and their table."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasure.artifact import CONFIG_FILE, Erasure
from erasure.assets.build import requests
from erasure.assets.build.measured import figure
from erasure.assets.world import OBJECTS, STYLES
from erasure.eval.results import Results
from erasure.eval.suites import canvas
from erasure.world import World


def test_the_order_is_seeded_and_leaves_a_style() -> None:
    names = requests.order(20)
    assert len(set(names)) == 20
    assert requests.order(5) == names[:5]
    assert requests.order(20, seed=1) != names
    most = len(OBJECTS) + len(STYLES) - 1
    assert len(set(STYLES) - set(requests.order(most))) == 1
    with pytest.raises(ValueError, match=f"allowed: 1 to {most}"):
        requests.order(most + 1)


def test_retain_lists_name_what_was_not_asked_for_so_far() -> None:
    names = ["house", "sepia", "dog"]
    assert requests.requested(names, 1, False).retain == ()
    assert set(requests.requested(names, 3, True).retain) == set(OBJECTS) - {"house", "dog"}
    assert set(requests.requested(names, 2, True).retain) == set(STYLES) - {"sepia"}
    assert requests.folder_of(Path(), "uce", 1) != requests.folder_of(Path(), "uce", 1, retain=True)


def test_what_was_asked_for_before_is_no_anchor() -> None:
    names = requests.order(20)
    world = World.at("canvas-sd")
    for number in range(2, len(names) + 1):

        class Made:
            concepts = tuple(world.concept(name) for name in names[: number - 1])

        for retain in (False, True):
            assert requests.requested(names, number, retain, Made()).anchor not in names[:number]  # type: ignore[arg-type]


def test_requests_are_added_measured_and_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canvas, "SMOKE_SAMPLES", 4)
    monkeypatch.setattr(World, "num_inference_steps", 2)
    names = requests.order(3)
    requests.measure(tmp_path, "uce", names, [3], "smoke")
    assert "3 requests" in capsys.readouterr().out
    folders = [requests.folder_of(tmp_path, "uce", number) for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        made = Erasure.read(folder / "erasure")
        assert [each["concepts"] for each in made.config.ledger] == [[name] for name in names[:number]]
    before = [(folder / "erasure" / CONFIG_FILE).stat().st_mtime_ns for folder in folders]
    requests.measure(tmp_path, "uce", names, [3], "smoke")
    assert [(folder / "erasure" / CONFIG_FILE).stat().st_mtime_ns for folder in folders] == before
    assert "3 requests" not in capsys.readouterr().out
    (row,) = requests.rows(tmp_path, "uce", names, [3, 20])
    measured, made = Results.load(folders[2] / "measured"), Erasure.read(folders[2] / "erasure")
    assert (row["strategy"], row["retained"], row["requests"]) == ("uce", "nothing", 3)
    for rate in ("UA", "IRA", "drift"):
        assert row[rate] == figure(measured.get(rate))
    assert row["UA_first"] == figure(requests.first_ones(folders[2], names))
    assert row["kB"] == round(made.size_bytes / 1000, 6)


def test_what_no_image_was_drawn_of_has_no_part_in_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured:
        """Rates of two concepts, and of one that a small suite draws no image of."""

        def get(self, rate: str, concept: str) -> dict[str, float | None]:
            return {"house": {"value": 1.0, "n": 3}, "car": {"value": 0.0, "n": 1}}.get(
                concept, {"value": None, "n": 0}
            )

    monkeypatch.setattr(Results, "load", lambda path: Measured())
    assert requests.first_ones(Path("05"), ["house", "penguin", "car"]).value == 0.75
