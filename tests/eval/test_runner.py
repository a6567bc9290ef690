"""The whole path: generate, judge, resume, cache, put together what processes made.

That several give what one gives is tested with the stress tests (`tests/eval/stress/test_shared.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from erasure.attach import ErasureManager
from erasure.errors import ArtifactError, EvaluationError
from erasure.eval import Results, evaluate
from erasure.eval.metrics.clip_score import ClipModel
from erasure.eval.samples import Sample
from erasure.eval.table import SampleTable, read_rows

Evaluate = Callable[..., Results]


@pytest.fixture
def measure(tmp_path: Path, judge: Any) -> Evaluate:
    """`evaluate` with the arbitrary judge and a cache of the test's own."""

    def call(pipe: Any, out: str = "out", **options: Any) -> Results:
        defaults: dict[str, Any] = {
            "size": "full", "judge": judge, "baseline_cache": tmp_path / "cache", "progress": False, "batch_size": 12,
        }  # fmt: skip
        return evaluate(pipe, out=tmp_path / out, **(defaults | options))

    return call


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "samples.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_before_and_after_from_one_pass(erased_pipe, measure, tmp_path, clip_folder) -> None:
    results = measure(erased_pipe, clip=clip_folder)
    rows = rows_of(tmp_path / "out")
    assert [row["variant"] for row in rows] == ["before"] * 12 + ["after"] * 12
    assert [row["sample_id"] for row in rows[:12]] == [row["sample_id"] for row in rows[12:]]
    assert all(row["judged"] and row["clip_score"] is not None and row["failures"] == {} for row in rows)
    assert all(row["drift"]["pixel"] > 0 and row["drift"]["feature"] > 0 for row in rows[12:])
    for variant in ("before", "after"):
        assert len(list((tmp_path / "out" / "images" / variant).glob("*.png"))) == 12
    names = {(row["name"], row["variant"]) for row in results.metrics}
    for name in ("UA", "UA_shape", "IRA", "CRA", "CRA_retained", "AA", "clip_score"):
        assert {(name, "before"), (name, "after")} <= names
    space = ClipModel(clip_folder).name
    assert space == f"{clip_folder.name}@{ClipModel(clip_folder).fingerprint[:8]}"
    assert {"drift", "drift_feature", f"cmmd[{space}]", f"kid[{space}]", f"fid[{space}]"} <= {n for n, _ in names}
    assert all(row["value"] is not None and row["recipe"]["suite"] == "canvas" for row in results.metrics)
    assert results.erasures[0]["strategy"] == "noise"
    assert results.get("UA")["n"] == 8
    assert results.get("UA")["concept"] == "cat"
    assert results.cost["erase_seconds"] == 1.5
    assert Results.load(tmp_path / "out") == results
    assert (tmp_path / "out" / "report.html").is_file()
    # The erasure is back in force afterwards.
    assert ErasureManager(erased_pipe).verify() == 1


def test_without_an_erasure_only_the_stock_model_is_measured(world_pipe, measure) -> None:
    results = measure(world_pipe, concepts="cat")
    assert {row["variant"] for row in results.metrics} == {"before"}
    results = measure(world_pipe, "plain")
    assert results.get("object_accuracy", "before")["n"] == 6


def test_the_baseline_is_generated_once(erased_pipe, measure, monkeypatch, clip_folder) -> None:
    first = measure(erased_pipe, "first", clip=clip_folder)
    assert first.cost["baseline_from_cache"] == 0
    ErasureManager(erased_pipe).set_erasures("cat-noise", 0.5)
    second = measure(erased_pipe, "second", clip=clip_folder)
    assert second.cost["baseline_from_cache"] == 12
    assert second.cost["images_generated"] == 12
    assert second.model["fingerprint"] == first.model["fingerprint"]
    same = [
        first.get(name, "before") == second.get(name, "before") for name in ("UA", "IRA", "CRA", "AA", "clip_score")
    ]
    assert all(same)
    assert second.get("drift")["value"] < first.get("drift")["value"]


def test_resume_after_a_kill_redoes_only_what_is_missing(erased_pipe, measure, tmp_path, clip_folder) -> None:
    # One image per batch, so that a resumed batch is made of the same images and rounding cannot differ.
    whole = measure(erased_pipe, clip=clip_folder, batch_size=1)
    out = tmp_path / "out"
    expected = rows_of(out)
    for stem in ("samples", "features"):
        lines = (out / f"{stem}.jsonl").read_bytes().splitlines(keepends=True)
        (out / f"{stem}.jsonl").write_bytes(b"".join(lines[:17]) + lines[17][:40])
    (out / "results.json").unlink()
    seen: list[tuple[str, int, int]] = []
    resumed = measure(erased_pipe, clip=clip_folder, batch_size=1, progress=lambda *args: seen.append(args))
    assert rows_of(out) == expected
    assert seen == [("after", done, 12) for done in range(6, 13)]
    assert resumed.metrics == whole.metrics
    # A finished folder is read, not generated again.
    again = measure(erased_pipe, clip=clip_folder, batch_size=1, progress=lambda *args: seen.append(args))
    assert len(seen) == 7
    assert again.metrics == whole.metrics


def test_an_exception_in_the_middle_keeps_what_is_done(erased_pipe, measure, tmp_path, judge) -> None:
    def interrupted(images: Any) -> Any:
        if len(rows_of(tmp_path / "out") if (tmp_path / "out" / "samples.jsonl").is_file() else []) >= 8:
            raise KeyboardInterrupt
        return judge(images)

    interrupted.version = judge.version
    with pytest.raises(KeyboardInterrupt):
        measure(erased_pipe, judge=interrupted, batch_size=4)
    assert len(rows_of(tmp_path / "out")) == 8
    assert ErasureManager(erased_pipe).verify() == 1
    measure(erased_pipe)
    assert len(rows_of(tmp_path / "out")) == 24


def test_another_recipe_is_not_resumed(erased_pipe, measure, tmp_path) -> None:
    measure(erased_pipe)
    with pytest.raises(EvaluationError, match=r"suite\.seed: 0 in the first, 1 in the second"):
        measure(erased_pipe, seed=1)
    ErasureManager(erased_pipe).set_erasures("cat-noise", 0.5)
    with pytest.raises(EvaluationError, match="erasures"):
        measure(erased_pipe)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(EvaluationError, match="holds no evaluation"):
        measure(erased_pipe, "mine")


def test_a_damaged_line_in_the_middle_is_named(erased_pipe, measure, tmp_path) -> None:
    measure(erased_pipe)
    path = tmp_path / "out" / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:30], *lines[3:]]) + "\n")
    with pytest.raises(EvaluationError, match="line 3 cannot be read as JSON"):
        measure(erased_pipe)


def test_failed_detections_are_null_with_a_reason(erased_pipe, measure, tmp_path, judge) -> None:
    def fragile(images: Any) -> Any:
        if len(images) > 1:
            raise RuntimeError("out of memory")
        red = images[0].resize((1, 1)).getpixel((0, 0))[0]
        if red % 2:
            raise ValueError("cannot see")
        return judge(images)

    results = measure(erased_pipe, judge=fragile)
    failed = [row for row in rows_of(tmp_path / "out") if row["judged"] is None]
    assert 0 < len(failed) < 24
    assert all(row["failures"]["judge"] == "ValueError: cannot see" for row in failed)
    missing = sum(row.get("missing", 0) for row in results.metrics if row["name"] in ("UA", "IRA"))
    assert missing == len(failed)


def test_a_failing_clip_is_null_with_a_reason(world_pipe, measure, tmp_path, clip_folder) -> None:
    class Broken(ClipModel):
        def images(self, images: Any) -> Any:
            raise RuntimeError("no memory")

    results = measure(world_pipe, concepts="cat", clip=Broken(clip_folder))
    assert results.get("clip_score", "before")["value"] is None
    assert results.get("UA", "before")["value"] is not None
    assert all(row["failures"] == {"clip": "RuntimeError: no memory"} for row in rows_of(tmp_path / "out"))


def test_without_images_nothing_is_kept_but_the_cache(erased_pipe, measure, tmp_path) -> None:
    results = measure(erased_pipe, images=False, report=False)
    assert not (tmp_path / "out" / "images").exists()
    assert not (tmp_path / "out" / "report.html").exists()
    assert results.get("drift")["value"] > 0


def test_bad_requests(erased_pipe, measure, tmp_path) -> None:
    with pytest.raises(EvaluationError, match="unknown suite"):
        measure(erased_pipe, suite="i3p")
    with pytest.raises(ArtifactError, match="no open_clip model"):
        measure(erased_pipe, clip=tmp_path)
    ErasureManager(erased_pipe).fuse()
    with pytest.raises(EvaluationError, match="fused"):
        measure(erased_pipe)


def test_a_broken_cache_entry_is_made_again(erased_pipe, measure, tmp_path) -> None:
    measure(erased_pipe, "first")
    answers = sorted((tmp_path / "cache" / "drawings").glob("*/answers-*"))
    assert len(answers) == 2
    images = sorted(answers[0].parent.glob("*.png"))
    images[0].write_bytes(images[0].read_bytes()[:20])
    entry = answers[0] / f"{images[1].stem}.json"
    entry.write_text("{")
    second = measure(erased_pipe, "second")
    # An image that is whole is judged again, not drawn again.
    assert second.cost["images_from_cache"] == 23
    assert json.loads(entry.read_text())["object"]
    with Image.open(images[0]) as image:
        image.load()


def row_of(sample: Sample) -> dict[str, Any]:
    scores = {"judged": None, "clip_score": None, "blank": False, "failures": {}, "drift": None, "seconds": None}
    return {**sample.row(), "variant": "before", **scores}


def test_parts_of_several_processes_are_read_together(tmp_path) -> None:
    samples = [Sample(f"s{number}", "a cat", number, "target") for number in (1, 0)]
    for rank in range(2):
        table = SampleTable(tmp_path, samples, rank, 2)
        table.append([row_of(samples[rank])], [None])
    table = SampleTable(tmp_path, samples)
    table.load()
    table.merge()
    assert [json.loads(line)["sample_id"] for line in (tmp_path / "samples.jsonl").open()] == ["s1", "s0"]
