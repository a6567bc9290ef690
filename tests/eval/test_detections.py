"""Detectors in an evaluation: rows keep what they find, rates are fail-closed, and nothing is asked or drawn twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure.errors import EvaluationError, OptionError
from erasure.eval import Results, evaluate
from erasure.eval.detectors import NamedDetector, Reading, get
from erasure.eval.detectors.choices import DetectorChoice, read_choices
from erasure.eval.detectors.findings import Finding
from erasure.eval.detectors.judging import CLEAR, FLAGGED, NOTHING, FindingJudge
from erasure.eval.table import read_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reddish(NamedDetector):
    """Flags pictures by their mean red, and fails on those that it is told to."""

    title = "red"
    licence = "none"
    name = "reddish"
    asked: list[int] = dataclasses.field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        """Leave the list as it is."""

    def recipe(self) -> Any:
        return {
            "detector": "reddish", "licence": "none", "weights": {}, "known": False, "classes": ["red", "face"],
            "flags": ["red"], "threshold": self.threshold, "channels": "rgb", "side": 1, "unit": "image",
            "preprocessing": "mean", "settings": {},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading | Exception]:
        self.asked.append(len(images))
        return [Reading({"red": float(np.asarray(image)[..., 0].mean() / 255)}) for image in images]

    def judge(self, reading: Reading) -> Finding:
        score = reading.scores["red"]
        labels = frozenset({"red"} if score >= self.threshold else ())
        return Finding(score >= self.threshold, score, labels, reading.scores)


@pytest.fixture
def measure(tmp_path: Path, judge: Any) -> Callable[..., Results]:
    def call(pipe: Any, out: str, **options: Any) -> Results:
        defaults = {"size": "full", "judge": judge, "baseline_cache": tmp_path / "cache", "clip": "none"}
        return evaluate(
            pipe, concepts=["cat"], out=tmp_path / out, progress=False, batch_size=12, **(defaults | options)
        )

    return call


def scores_of(folder: Path, label: str = "reddish") -> list[float]:
    return [row["detected"][label]["score"] for row in read_rows(folder / "samples.jsonl")]


def test_rows_keep_findings_and_another_threshold_draws_and_asks_nobody(
    erased_pipe: Any, measure: Callable[..., Results], drawn: list[int], tmp_path: Path
) -> None:
    first = Reddish(threshold=0.01)
    found = measure(erased_pipe, "first", detectors=[first])
    assert sum(drawn) == 24
    scores = scores_of(tmp_path / "first")
    assert len(scores) == 24
    assert all(0 < score < 1 for score in scores)
    drawn.clear()
    other = Reddish(threshold=float(np.median(scores)))
    again = measure(erased_pipe, "again", detectors=[other])
    assert drawn == []
    assert sum(other.asked) == 2  # the control pictures of the self-test
    assert scores_of(tmp_path / "again") == scores
    before = again.get("flagged_rate[reddish]", "before")
    rate = found.get("flagged_rate[reddish]")
    assert rate["value"] == 1.0
    assert rate["low"] < 1
    assert rate["recipe"]["detector"]["threshold"] == 0.01
    assert rate["mcnemar_p"] == 1.0
    assert rate["transitions"]["both"] == rate["n"]
    assert set(rate["curve"]) > {"0.5", "0.6", "0.75"} or before["value"] is None
    assert found.get("control_flagged[reddish]", "before")["holds"]
    # The other numbers of the suite are those that it gives without detectors.
    plain = measure(erased_pipe, "plain")
    assert found.get("UA") == plain.get("UA")
    entry = found.detectors[0]
    assert (entry["label"], entry["controls"]) == ("reddish", None)
    assert Results.load(tmp_path / "first").detectors == found.detectors
    assert "detectors" not in plain.to_dict()


def test_a_detector_that_sees_nothing_on_stock_images_gives_no_rate(
    erased_pipe: Any, measure: Callable[..., Results]
) -> None:
    found = measure(erased_pipe, "blind", detectors=[Reddish(threshold=1.0)])
    for variant in ("before", "after"):
        row = found.get("flagged_rate[reddish]", variant)
        assert row["value"] is None
        assert "the detector reddish flags what shows 'cat' in 0% of" in row["reason"]
    assert "sensitivity was not measured" in found.get("new_flags[reddish]")["reason"]
    assert not found.get("control_flagged[reddish]", "before")["holds"]


def test_controls_of_the_user_go_into_results(
    erased_pipe: Any, measure: Callable[..., Results], tmp_path: Path
) -> None:
    for name, colour in (("positive", 200), ("negative", 20)):
        (tmp_path / "controls" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 40, (32, 32, 3), dtype=np.uint8)
            pixels[..., 0] += colour
            Image.fromarray(pixels).save(tmp_path / "controls" / name / f"{index}.png")
    found = measure(erased_pipe, "measured", detectors=[Reddish(threshold=0.7)], controls=tmp_path / "controls")
    controls = found.detectors[0]["controls"]
    assert controls["sensitivity"]["value"] == controls["specificity"]["value"] == 1.0
    # What the prompts cannot show, the user's own pictures do: no new flag is a finding then.
    assert found.get("new_flags[reddish]")["value"] == 0.0
    assert found.get("flagged_rate[reddish]")["value"] is None
    with pytest.raises(EvaluationError, match="has no detector to measure on them"):
        measure(erased_pipe, "none", controls=tmp_path / "controls")


def test_what_a_detector_cannot_judge_is_missing(erased_pipe: Any, measure: Callable[..., Results]) -> None:
    class Picky(Reddish):
        def read(self, images: Sequence[Image.Image]) -> list[Reading | Exception]:
            found = super().read(images)
            return [
                ValueError("no idea") if index == 1 and len(images) > 3 else each for index, each in enumerate(found)
            ]

    found = measure(erased_pipe, "picky", detectors=[Picky(threshold=0.01)])
    row = found.get("flagged_rate[reddish]")
    assert row["missing"] >= 1
    assert row["worst"]["value"] == 1.0
    labels = found.get("labels[reddish]")
    assert labels["n"] + labels["missing"] == row["n"] + row["missing"]


def test_texts_name_detectors() -> None:
    choice = DetectorChoice.read("clip=clip_zero_shot:model=a,b,flags=a cat, sitting|cats,others=dog,threshold=0.25")
    made: Any = choice.make()
    assert (choice.key, made.model, made.threshold) == ("clip", "a,b", 0.25)
    assert (made.flags, made.others) == (("a cat, sitting", "cats"), ("dog",))
    assert DetectorChoice.read("nudenet:preset=mace,side=640").make() == get("nudenet").configured("mace", side=640)
    assert list(read_choices(["nsfwjs", "strict=nsfwjs:threshold=0.1"])) == ["nsfwjs", "strict"]
    with pytest.raises(EvaluationError, match=r"two detectors are called 'nsfwjs'.*first=nsfwjs"):
        read_choices(["nsfwjs", "nsfwjs:threshold=0.1"])
    with pytest.raises(OptionError, match="threshold"):
        DetectorChoice.read("nsfwjs:threshold=much")
    with pytest.raises(OptionError, match=r"has no option 'treshold'.*threshold"):
        DetectorChoice.read("nsfwjs:treshold=1")
    with pytest.raises(EvaluationError, match="unknown detector 'nfswjs'"):
        DetectorChoice.read("nfswjs")
    with pytest.raises(EvaluationError, match="expected NAME"):
        DetectorChoice.read("nsfwjs:")
    with pytest.raises(EvaluationError, match="expected a detector"):
        read_choices({"mine": print})  # type: ignore[dict-item]


def test_findings_are_answers() -> None:
    detector = Reddish()
    flags = FindingJudge({"a": detector}, "a")
    assert (flags.answer({"a": Finding(True, 0.9)}), flags.answer({"a": Finding(False, 0.2)})) != (None, None)
    seen: Any = flags.answer({"a": Finding(True, 0.9)})
    assert (seen.object, flags.object_names) == (FLAGGED, (FLAGGED, CLEAR))
    assert isinstance(flags.answer({"a": Finding(None, None, reason="blank")}), Exception)
    classes = FindingJudge({"a": detector, "b": detector}, "a", "b", ("cat", "dog"), ("ink",))
    scores = {"cat": 0.4, "dog": 0.5, "horse": 0.9}
    findings = {"a": Finding(False, 0.1, frozenset(scores), scores), "b": Finding(True, 0.9, frozenset({"oil"}))}
    both: Any = classes.answer(findings)
    assert (both.object, both.style) == ("dog", NOTHING)
    assert classes.fingerprint != dataclasses.replace(classes, names=("cat",)).fingerprint
