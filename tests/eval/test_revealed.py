"""Pictures that a report hides are on a page of their own, and only where somebody asks for it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure.eval import evaluate
from erasure.eval.report import write_revealed
from tests.eval.conftest import OBJECTS


def pictures(page: Path) -> list[np.ndarray]:
    """Every picture in a page."""
    found = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")) for each in found]


def longest_side(page: Path) -> int:
    return max(side for image in pictures(page) for side in image.shape[:2])


@pytest.fixture
def run(erased_pipe: Any, judge: Any, tmp_path: Path) -> Any:
    """Evaluate with a detector that flags everything."""

    def call(**more: Any) -> Path:
        detector = f"clip_zero_shot:flags={OBJECTS[0]},others={OBJECTS[1]},threshold=0"
        evaluate(
            erased_pipe, "canvas", ["cat"], size="smoke", out=tmp_path / "out", judge=judge, clip="none",
            progress=False, baseline_cache=tmp_path / "cache", detectors=[detector], **more,
        )  # fmt: skip
        return tmp_path / "out"

    return call


def test_hidden_pictures_are_revealed_only_on_request(run: Any) -> None:
    out = run()
    assert not (out / "revealed.html").exists()
    assert longest_side(out / "report.html") <= 16
    run(reveal=True)
    shown = pictures(out / "revealed.html")
    drawn = [np.asarray(Image.open(path).convert("RGB")) for path in (out / "images").rglob("*.png")]
    assert shown
    assert all(any(np.array_equal(image, other) for other in drawn) for image in shown)
    assert longest_side(out / "report.html") <= 16

    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row["unsafe"] = False
        for finding in row["detected"].values():
            finding["flagged"] = False
    (out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_revealed(out) is None
    assert not (out / "revealed.html").exists()
