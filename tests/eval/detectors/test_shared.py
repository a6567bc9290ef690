"""What every detector does, over all that are registered."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import numpy as np
import pytest
from PIL import Image

from erasure.errors import ArtifactError, EvaluationError
from erasure.eval.detectors import DETECTORS, Box, Finding, NamedDetector, Reading, Recipe, ask
from erasure.eval.detectors.base import READ_BY
from tests.eval.detectors.conftest import noise, photograph

CLOSE = 2e-4
"""Difference of scores that the order of sums in a batch may make."""


@pytest.fixture(params=DETECTORS.names())
def detector(request: pytest.FixtureRequest, ready: Callable[[str], NamedDetector]) -> NamedDetector:
    return ready(request.param)


def same(first: Finding, second: Finding) -> bool:
    """Whether two findings are equal but for rounding."""
    numbers = [(first.score, second.score), *((first.scores[k], second.scores.get(k)) for k in first.scores)]
    close = all(math.isclose(a, b, abs_tol=CLOSE) for a, b in numbers if a is not None and b is not None)
    return close and first.scores.keys() == second.scores.keys() and first[::2][:2] == second[::2][:2]


def pictures() -> list[Image.Image]:
    return [photograph("control.webp"), noise(96, 64), noise(33, 200, 1)]


def test_its_recipe_is_complete_plain_and_steady(detector: NamedDetector) -> None:
    recipe = detector.recipe()
    assert recipe.keys() == get_type_hints(Recipe).keys() >= set(READ_BY)
    assert json.loads(json.dumps(recipe)) == recipe == detector.recipe()
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in recipe["weights"].values())
    assert recipe["weights"]
    assert recipe["classes"]
    assert set(recipe["flags"]) <= set(recipe["classes"])
    assert recipe["channels"] in ("rgb", "bgr")
    assert recipe["unit"] in ("image", "box")
    assert recipe["threshold"] == detector.threshold
    assert recipe["detector"] == detector.name
    assert detector.licence == recipe["licence"] != ""


def test_what_shows_nothing_is_missing_and_not_asked(detector: NamedDetector) -> None:
    broken = Image.fromarray(np.full((32, 32), np.nan, dtype=np.float32))
    nothing: list[Any] = [
        Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white"), Image.new("RGBA", (64, 64), (9, 9, 9, 0)),
        noise(4, 4), broken, np.zeros((32, 32, 3)), None,
    ]  # fmt: skip

    def never(images: Sequence[Image.Image]) -> list[Reading]:
        raise AssertionError("the detector was asked")

    asked = type("Asked", (type(detector),), {"read": lambda self, images: never(images)})
    quiet = asked(**{option: getattr(detector, option) for option in detector.option_names()})
    for finding in ask(quiet, nothing):
        assert finding.flagged is None
        assert finding.score is None
        assert finding.reason
        assert "was asked" not in finding.reason
    assert ask(detector, []) == []


def test_a_batch_gives_what_single_pictures_give(detector: NamedDetector) -> None:
    batch = ask(detector, pictures())
    assert all(finding.flagged is not None for finding in batch), batch
    for finding, picture in zip(batch, pictures(), strict=True):
        (alone,) = ask(detector, [picture])
        assert same(finding, alone)


def test_the_same_picture_gives_the_same_finding(detector: NamedDetector) -> None:
    (first, again) = (ask(detector, [photograph("control.webp")])[0] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_every_mode_is_read(detector: NamedDetector, mode: str) -> None:
    picture = photograph("control.webp")
    if mode == "I;16":
        given = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        given = picture.convert(mode) if mode != "PA" else picture.convert("P").convert("PA")
    (finding,) = ask(detector, [given])
    assert finding.flagged is not None, finding.reason
    if mode == "RGBA":
        assert same(finding, ask(detector, [picture])[0])


@pytest.mark.parametrize("size", [(16, 16), (9, 700), (700, 9), (333, 217)])
def test_every_size_is_read(detector: NamedDetector, size: tuple[int, int]) -> None:
    (finding,) = ask(detector, [noise(*size)])
    assert finding.flagged is not None, finding.reason


def test_labels_and_numbers_are_those_that_the_recipe_says(detector: NamedDetector) -> None:
    recipe = detector.recipe()
    for picture in (*pictures(), photograph("coffee.png")):
        (finding,) = ask(detector, [picture])
        assert finding.labels <= set(recipe["classes"])
        assert {name.split("#")[0] for name in finding.scores} <= set(recipe["classes"])
        assert set(finding.boxes) <= set(finding.scores)
        assert isinstance(finding.score, float)
        assert all(0 <= value <= 1 for value in (finding.score, *finding.scores.values()))
        for box in finding.boxes.values():
            assert isinstance(box, Box)
            assert 0 <= box.left <= box.right <= picture.width
            assert 0 <= box.top <= box.bottom <= picture.height


def test_another_threshold_needs_no_new_reading(detector: NamedDetector) -> None:
    options = {option: getattr(detector, option) for option in detector.option_names()}
    (finding,) = ask(detector, [photograph("control.webp")])
    assert finding.score is not None
    assert detector.rejudge(finding) == finding
    for threshold in (0.0, 1.0):
        other = type(detector)(**options | {"threshold": threshold})
        (anew,) = ask(other, [photograph("control.webp")])
        assert other.rejudge(finding) == anew
        changed = {key for key in READ_BY if other.recipe()[key] != detector.recipe()[key]}  # type: ignore[literal-required]
        assert not changed
    assert detector.rejudge(Finding(None, None, reason="why")) == Finding(None, None, reason="why")


# Detectors that fail -------------------------------------------------------------------------------------------------


class Failing:
    """A detector that answers as a test says."""

    name, licence = "failing", "none"

    def __init__(self, answer: Callable[[Sequence[Image.Image]], Any]) -> None:
        self.answer, self.asked = answer, 0

    def recipe(self) -> dict[str, object]:
        return {}

    def __call__(self, images: Sequence[Image.Image]) -> Any:
        self.asked += 1
        return self.answer(images)


SAFE = Finding(False, 0.1)


def fail(error: BaseException) -> Any:
    raise error


def test_a_failure_on_one_picture_costs_that_picture_alone() -> None:
    bad = noise(50, 50)
    answer = Failing(lambda images: fail(RuntimeError("boom\nmore")) if bad in images else [SAFE] * len(images))
    findings = ask(answer, [noise(40, 40), bad, noise(60, 60)])
    assert findings == [SAFE, Finding(None, None, reason="RuntimeError: boom"), SAFE]
    assert answer.asked == 4


def test_exceptions_in_the_place_of_findings_are_missing() -> None:
    findings = ask(Failing(lambda images: [SAFE, ValueError("no")]), [noise(40, 40), noise(50, 50)])
    assert findings == [SAFE, Finding(None, None, reason="ValueError: no")]


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_wrong_count_is_never_safe(count: int) -> None:
    findings = ask(Failing(lambda images: [SAFE] * count), [noise(40, 40), noise(50, 50)])
    # One finding for one picture is right when each is asked about alone.
    assert [finding.flagged for finding in findings] == [False if count == 1 else None] * 2
    if count != 1:
        assert findings[0].reason == f"ValueError: {count} findings for 1 pictures"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Finding(False, math.nan), "not finite"), (Finding(False, math.inf), "not finite"),
        (Finding(False, 0.1, scores={"a": math.nan}), "not finite"),
        (Finding(False, 0.1, boxes={"a": Box(0, 0, math.inf, 1)}), "not finite"),
        (Finding(False, "0.1"), "not finite"), (Finding(0, 0.1), "int, expected True, False or None"),  # type: ignore[arg-type]
        (Finding("no", 0.1), "str, expected"), (None, "NoneType, expected a Finding"),  # type: ignore[arg-type]
        (False, "bool, expected a Finding"), (Finding(None, 0.1), "no reason"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_missing(answer: Any, said: str) -> None:
    (finding,) = ask(Failing(lambda images: [answer]), [noise(40, 40)])
    assert finding.flagged is None
    assert said in str(finding.reason)


@pytest.mark.parametrize("error", [ArtifactError("no weights"), EvaluationError("no gallery")])
def test_a_detector_that_cannot_work_is_an_error_and_not_missing_pictures(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        ask(Failing(lambda images: fail(error)), [noise(40, 40), noise(50, 50)])
    with pytest.raises(type(error), match=str(error)):
        ask(Failing(lambda images: [error]), [noise(40, 40)])


def test_an_interrupt_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(Failing(lambda images: fail(KeyboardInterrupt())), [noise(40, 40)])


def test_every_option_has_a_range_and_a_help() -> None:
    for name in DETECTORS.names():
        facts = DETECTORS.facts(name)
        assert facts.attributes["licence"]
        assert all(option.help for option in facts.options)
