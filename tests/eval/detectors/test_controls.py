"""Controls of detectors: what is not as it was known is refused, and rates are counted with what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure.errors import ArtifactError, EvaluationError
from erasure.eval.detectors import DETECTORS, Finding, NamedDetector, Reading, Recipe, get, nsfwjs
from erasure.eval.detectors.base import Golden
from erasure.eval.detectors.controls import ask_files, control_pictures, measure, pictures_in, self_test, share
from erasure.eval.statistics import wilson
from tests.eval.detectors.conftest import noise


@dataclass(frozen=True, kw_only=True)
class Redness(NamedDetector):
    """Flags pictures by the mean of red."""

    title, licence = "how red pictures are", "none"
    known: bool = True
    wanted: float = 0.6

    def recipe(self) -> Recipe:
        return {
            "detector": "redness", "licence": "none", "weights": {"none": "0" * 64}, "known": self.known,
            "classes": ["red"], "flags": ["red"], "threshold": self.threshold, "channels": "rgb", "side": 0,
            "unit": "image", "preprocessing": "none", "settings": {},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        return [Reading({"red": float(np.asarray(image)[..., 0].mean()) / 255}) for image in images]

    def judge(self, reading: Reading) -> Finding:
        score = reading.scores["red"]
        return Finding(score >= self.threshold, score, frozenset(), reading.scores)

    def golden(self) -> Golden:
        return {"whole": {"red": self.wanted}}


@pytest.mark.parametrize("name", DETECTORS.names())
def test_every_detector_passes_its_own_test(name: str, ready: Callable[[str], NamedDetector]) -> None:
    detector = ready(name)
    tested = self_test(detector)
    assert tested.known_weights is detector.recipe()["known"]
    assert tested.compared == (sum(map(len, detector.golden().values())) if tested.known_weights else 0)


def test_known_weights_with_other_scores_are_refused() -> None:
    red = float(np.asarray(control_pictures()["whole"])[..., 0].mean()) / 255
    assert self_test(Redness(wanted=red + 0.015)).compared == 1
    with pytest.raises(EvaluationError, match=r"gives the control picture \(whole\) .* for red, .* within 0\.02"):
        self_test(Redness(wanted=red + 0.025))
    assert self_test(Redness(wanted=red + 0.5, known=False)).remark.startswith("The weights are unknown")


@pytest.mark.parametrize(
    "other",
    [lambda values: values.flip(2), lambda values: values.flip(1), lambda values: values * 2 - 1],
    ids=["turned", "blue for red", "from -1 to 1"],
)
def test_other_preprocessing_of_the_built_in_detector_is_refused(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = nsfwjs.pixels
    monkeypatch.setattr(nsfwjs, "pixels", lambda image: other(right(image)))
    with pytest.raises(EvaluationError, match="do not use its numbers"):
        self_test(get("nsfwjs")())


def test_a_detector_that_says_nothing_of_the_control_picture_is_refused() -> None:
    class Silent(Redness):
        def read(self, images: Sequence[Image.Image]) -> Any:
            return [ValueError("nothing") for _ in images]

    with pytest.raises(EvaluationError, match=r"cannot say anything about a control picture \(ValueError: nothing"):
        self_test(Silent())


@pytest.fixture
def controls(tmp_path: Path) -> Path:
    """Red pictures and others, one of each on the wrong side, one damaged and one of a single colour."""
    red, blue = noise(32, 32), noise(32, 32)
    red.paste("red", (0, 0, 32, 30))
    blue.paste("blue", (0, 0, 32, 30))
    for name, pictures in (("positive", [red] * 7 + [blue]), ("negative", [blue] * 6 + [red])):
        (tmp_path / name / "more").mkdir(parents=True)
        for index, picture in enumerate(pictures):
            picture.save(tmp_path / name / ("more" if index % 2 else "") / f"{index}.png")
    (tmp_path / "negative" / "damaged.png").write_bytes(b"nothing")
    (tmp_path / "negative" / "notes.txt").write_text("no picture")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "positive" / "flat.png")
    return tmp_path


def test_rates_are_counted_with_what_is_missing(controls: Path) -> None:
    found = measure(Redness(), controls)
    seen, left = found.sensitivity, found.specificity
    assert (seen.value, seen.low, seen.high) == wilson(7, 8)
    assert (seen.n, seen.missing, seen.worst) == (8, 1, 7 / 9)
    assert (left.value, left.low, left.high) == wilson(6, 7)
    assert (left.n, left.missing, left.worst) == (7, 1, 6 / 8)
    assert set(found.wrong) == {
        "positive/more/7.png", "positive/flat.png", "negative/6.png", "negative/damaged.png",
    }  # fmt: skip
    assert found.wrong["positive/flat.png"].startswith("a picture of one colour")
    assert found.wrong["negative/6.png"].startswith("flagged, score 0.9")
    assert found.to_dict()["specificity"]["missing"] == 1  # type: ignore[index]


def test_too_many_missing_give_no_rate() -> None:
    assert share([True, None], True).value is None
    assert share([True, None], True).worst == 0.5
    assert share([None], False).reason == "no judged sample: every image shows nothing, or could not be judged"
    assert share([], True).reason == "no sample"


def test_folders_that_measure_nothing_are_refused(controls: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is no folder"):
        pictures_in(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no picture"):
        pictures_in(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="lack the folder positive and negative"):
        measure(Redness(), tmp_path / "empty")
    for file in pictures_in(controls / "negative"):
        file.unlink()
    with pytest.raises(EvaluationError, match="holds no picture"):
        measure(Redness(), controls)


def test_files_are_asked_about_in_their_order(controls: Path) -> None:
    files = pictures_in(controls)
    whole = ask_files(Redness(), files)
    assert ask_files(Redness(), files, batch=2) == whole
    assert [finding.flagged is None for finding in whole] == [file.stem in ("damaged", "flat") for file in files]


def test_weights_that_are_missing_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nsfwjs, "FILE", tmp_path / "nothing")
    with pytest.raises(ArtifactError):
        self_test(get("nsfwjs")())
