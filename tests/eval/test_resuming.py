"""Runs that go on: torn lines, rows of something else, two processes on one folder, full disks, detectors' answers."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval import Results, evaluate, replay, write_report
from erasure.eval.attacks.prompts import AdversarialPrompt, write_prompts
from erasure.eval.drawings import DrawingCache
from erasure.eval.processes import Processes
from erasure.eval.run import opened
from erasure.eval.samples import Sample
from erasure.eval.scoring import KeptAnswer
from erasure.eval.suites import Target
from erasure.eval.table import SampleTable, encode_vector
from erasure.images import png

SAMPLE = Sample("cat-0", "a cat", 7, "target", ("cat",), "ink", ("cat",), height=32, width=32)
OTHER = Sample("cat-1", "a cat", 8, "target", style="ink")
JUDGED = {"object": "cat", "objects": ["cat"], "style": "ink"}
SCORES = {"judged": JUDGED, "clip_score": 0.25, "blank": False, "failures": {}}
ANSWER = KeptAnswer("cat", ["cat"], "ink", None, {"cat": 0.75}, {"ink": 1.0}, {})
IMAGE = Image.new("RGB", (32, 32), "red")
PROMPT = AdversarialPrompt(SAMPLE, "a c a t", Target("cat", "object", ("cat",)), {"attack": "unlearndiffatk"})


def row(sample: Sample = SAMPLE, variant: str = "before") -> dict[str, Any]:
    return {**sample.row(), "variant": variant, **SCORES, "drift": None, "seconds": 0.5}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(each) + "\n" for each in rows)


def results() -> Results:
    metric = {"name": "UA", "concept": "cat", "value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "recipe": {}}
    return Results("canvas", "quick", {"name": "canvas-sd"}, [], [metric], {"seconds": 1.0})


def table(folder: Path) -> SampleTable:
    return SampleTable(folder, [SAMPLE, OTHER])


def test_a_torn_last_line_is_redone_and_nothing_else(tmp_path: Path) -> None:
    first = table(tmp_path)
    first.append([row()], [np.ones(4)])
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for length in (1, 40, 400):
        for name, content in whole.items():
            (tmp_path / name).write_bytes(content + content[:length].rstrip(b"\n"))
        again = table(tmp_path)
        again.cut()
        again.load()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
        assert list(again.rows) == list(again.features) == [("cat-0", "before")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_id": "dog-0"}, "'dog-0', variant 'before', which are not of this evaluation"),
        ({"variant": "later"}, "variant 'later', which are not of this evaluation"),
        ({"seed": 8}, "seed: 8 in the first, 7 in the second"),
        ({"prompt": "a dog"}, "prompt"),
        ({"blank": True}, "a second row of 'cat-0'"),
    ],
)
def test_rows_of_something_else_are_not_mixed_in(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(lines(row(), row() | changes))
    with pytest.raises(EvaluationError, match=said):
        table(tmp_path).load()
    # A kill while parts are put together leaves the same rows twice.
    (tmp_path / "samples.jsonl").write_text(lines(row(), row()))
    table(tmp_path).load()


@pytest.mark.parametrize(
    "features", ["", "!", "AAAA", encode_vector(np.ones(3)), encode_vector(np.full(4, np.inf)), encode_vector([])]
)
def test_broken_features_are_named(features: str, tmp_path: Path) -> None:
    first = {"sample_id": "cat-0", "variant": "before", "features": encode_vector(np.ones(4))}
    second = {"sample_id": "cat-1", "variant": "before", "features": features}
    (tmp_path / "features.jsonl").write_text(lines(first, second))
    with pytest.raises(EvaluationError, match="features of 'cat-1'"):
        table(tmp_path).load()


def test_rows_whose_features_are_lost_are_made_again(tmp_path: Path) -> None:
    # Rows of images that CLIP was not asked about have no features.
    rows = [row(), row(OTHER), row(variant="after"), row(OTHER, "after") | {"clip_score": None}]
    features = [np.ones(4), np.ones(4), np.ones(4), None]
    with opened(Processes(), table, {}, tmp_path) as found:
        found.append(rows, features)
    lost = tmp_path / "features.jsonl"
    lost.write_text("".join(lost.read_text().splitlines(keepends=True)[1:]))
    with opened(Processes(), table, {}, tmp_path) as found:
        assert list(found.rows) == [("cat-1", "before"), ("cat-0", "after"), ("cat-1", "after")]
        found.append(rows[:1], features[:1])
    lost.unlink()
    with opened(Processes(), table, {}, tmp_path) as found:
        assert list(found.rows) == [("cat-1", "after")]
        found.append(rows[:3], features[:3])
    with opened(Processes(), table, {}, tmp_path) as found:
        assert len(found.rows) == 4


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    def open_it(recipe: dict[str, Any]) -> Any:
        return opened(Processes(), table, recipe, tmp_path / "out")

    with open_it({"seed": 0}) as first:
        first.append([row()], [np.ones(4)])
        with pytest.raises(EvaluationError, match="another process"), open_it({"seed": 0}):
            pass
    with pytest.raises(EvaluationError, match="seed: 0 in the first, 1 in the second"), open_it({"seed": 1}):
        pass
    with open_it({"seed": 0}) as again:
        assert list(again.rows) == [("cat-0", "before")]


@pytest.mark.parametrize("changes", [{"object": 3}, {"objects": "cat"}, {"object_score": np.nan}, {"style": [[]]}])
def test_answers_that_could_not_be_read_again_are_refused_at_once(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="the row of 'cat-0'"):
        table(tmp_path).append([row() | {"judged": JUDGED | changes}], [np.ones(4)])
    assert list(tmp_path.iterdir()) == []


# Disks that are full, folders that cannot be written ----------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the disk full after a few more bytes."""

    def fill() -> None:
        write = os.write

        def some(handle: int, content: Any) -> int:
            if len(content) < 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(handle, content[: len(content) // 2])

        def none(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", some)
        monkeypatch.setattr(os, "fsync", none)

    return fill


def test_a_full_disk_loses_nothing(full: Any, tmp_path: Path) -> None:
    kept, cache = table(tmp_path / "out"), DrawingCache(tmp_path, {}, judge={}, clip={"clip": "c"})
    (tmp_path / "out").mkdir()
    kept.append([row()], [np.ones(4)])
    results().save(tmp_path / "out")
    write_prompts(tmp_path / "out", [PROMPT])
    cache.put_image(SAMPLE, png(IMAGE))
    cache.put_answer(SAMPLE, ANSWER)
    cache.put_features(SAMPLE, 0.5, np.ones(4))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    full()
    for write in (
        lambda: kept.append([row(OTHER)], [np.ones(4)]),
        lambda: results().save(tmp_path / "out"),
        lambda: write_prompts(tmp_path / "out", []),
        lambda: cache.put_image(SAMPLE, png(IMAGE)),
        lambda: cache.put_answer(SAMPLE, ANSWER),
        lambda: cache.put_features(SAMPLE, 0.5, np.ones(4)),
        lambda: write_report(tmp_path / "out"),
        kept.merge,
    ):
        with pytest.raises(EvaluationError, match="No space left on device"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(kept.rows) == [("cat-0", "before")]


def test_a_place_that_cannot_be_written_is_named(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    options = {"judge": judge, "progress": False, "size": "smoke"}
    with pytest.raises(EvaluationError, match="cannot write"):
        evaluate(erased_pipe, out=tmp_path / "file" / "out", baseline_cache=tmp_path / "cache", **options)
    with pytest.raises(EvaluationError, match="baseline_cache or ERASURE_CACHE"):
        evaluate(erased_pipe, out=tmp_path / "out", baseline_cache=tmp_path / "file", **options)
    with pytest.raises(EvaluationError, match="cannot write"):
        replay(
            erased_pipe, write_prompts(tmp_path, [PROMPT]), out=tmp_path / "file" / "out", judge=judge, progress=False
        )
    assert (tmp_path / "file").read_text() == "mine"
