"""Suites that compare ways to draw, on the embedded model and by closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.assets.scenes import Scene, render
from erasure.errors import EvaluationError
from erasure.eval import compare, evaluate
from erasure.eval.metrics.comparisons import means, rates
from erasure.eval.metrics.removals import consensus
from erasure.eval.rows import is_control
from erasure.eval.suites import Plan, get
from erasure.eval.suites.removal import MOST, decibels, plate
from erasure.world import World


@pytest.fixture(scope="module")
def canvas() -> Any:
    import erasure

    return erasure.load_pipeline("canvas-sd", device="cpu")


@pytest.fixture(scope="module", params=["removal", "composition"])
def run(request: pytest.FixtureRequest, canvas: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "composition":  # of which nothing is claimed here that takes well drawn pictures
            patch.setattr(World, "num_inference_steps", 4)
        results = evaluate(canvas, request.param, size="smoke", out=folder, progress=False)
        yield request.param, folder, results


def test_every_variant_draws_every_sample(run: Any) -> None:
    suite, folder, _ = run
    kit = get(suite)
    assert not kit.of_concepts
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    names = [row["sample_id"] for row in rows if row["variant"] == kit.variant_names()[0]]
    assert len(names) == len(set(names)) == 8
    for variant in kit.variant_names():
        assert [row["sample_id"] for row in rows if row["variant"] == variant] == names
        assert len(list((folder / "images" / variant).glob("*.png"))) == 8
    assert (folder / "report.html").stat().st_size > 10_000


def test_rows_have_the_promised_names(run: Any) -> None:
    suite, _, results = run
    wanted = {
        "removal": ({"object_gone", "psnr_fill", "psnr_background"}, {"inpainting", "attentive_eraser"}),
        "composition": (
            {"both_found", "clip_full", "clip_minimum_object"},
            {"stock", "attend_and_excite", "a_star", "segregation"},
        ),
    }[suite]
    for name in wanted[0]:
        for variant in wanted[1]:
            row = results.get(name, variant=variant)
            assert row["value"] is not None
            assert row["n"] == 8
    reference = get(suite).variant_names()[0]
    tested = [row for row in results.metrics if row["variant"] != reference and not is_control(row)]
    assert all("mcnemar_p" in row or "change" in row for row in tested)


def test_the_same_command_goes_on_where_a_killed_one_stopped(run: Any, canvas: Any) -> None:
    suite, folder, results = run
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:11]) + lines[11][:20])
    again = evaluate(canvas, suite, size="smoke", out=folder, progress=False)
    assert len((folder / "samples.jsonl").read_text().splitlines()) == len(lines)
    # Samples that are drawn again come in other batches, which round otherwise.
    values = [[row["value"] for row in found.metrics] for found in (results, again)]
    assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-4)


def test_results_can_be_compared(run: Any) -> None:
    suite, folder, _ = run
    table = compare([folder])
    assert {row["label"] for row in table.rows} == set(get(suite).variant_names())


def test_attentive_eraser_removes_what_inpainting_draws_again(run: Any) -> None:
    suite, _, results = run
    if suite == "removal":
        gone = [results.get("object_gone", variant=v)["value"] for v in ("attentive_eraser", "inpainting")]
        assert gone[0] >= gone[1] + 0.5
        fill = [results.get("psnr_fill", variant=v)["value"] for v in ("attentive_eraser", "inpainting")]
        assert fill[0] > fill[1] + 10


def test_sizes_are_checked(canvas: Any) -> None:
    for suite in ("removal", "composition"):
        with pytest.raises(EvaluationError, match="no size 'huge'"):
            get(suite).plan(canvas, [], "huge", 0)


def test_a_scene_without_an_object_keeps_the_other_where_it_is() -> None:
    scene = Scene(("cat", "dog"), "noto", "striped", ((1, 2), (0, -3)))
    whole, left = render(scene), render(scene, without=1)
    assert not left.masks[1].any()
    assert np.array_equal(left.masks[0], whole.masks[0])
    # Soft edges of the one reach into the mask of the other.
    assert np.mean(left.image[whole.masks[0]] != whole.image[whole.masks[0]]) < 0.05
    assert np.mean(left.image[whole.masks[1]] != whole.background[whole.masks[1]]) < 0.05


def test_psnr_in_closed_form(canvas: Any) -> None:
    sample = get("removal").plan(canvas, [], "smoke", 0).samples[0]
    truth = plate(sample)
    kit: Any = get("removal")
    assert kit.measure(sample, Image.fromarray(truth.clean)) == dict.fromkeys(
        ("psnr_fill", "psnr_outside", "psnr_background"), MOST
    )
    off = truth.clean.astype(int)
    off[truth.mask] += np.where(off[truth.mask] > 127, -51, 51)  # a fifth of the range
    found = kit.measure(sample, Image.fromarray(off.astype(np.uint8)))
    assert found["psnr_fill"] == pytest.approx(-20 * math.log10(0.2))
    assert found["psnr_outside"] == found["psnr_background"] == MOST
    assert decibels(torch.empty(0)) is None


def rows_of(values: dict[str, list[float]]) -> dict[str, list[dict[str, Any]]]:
    return {
        variant: [
            {"sample_id": str(i), "prompt": str(i), "weight": 1.0, "variant": variant, "value": v}
            for i, v in enumerate(each)
        ]
        for variant, each in values.items()
    }


def test_rates_and_means_are_paired_with_the_first_variant() -> None:
    plan = Plan("removal", "smoke", 0, (), (), {})
    rows = rows_of({"first": [0, 0, 0, 0, 1], "second": [1, 1, 1, 0, 0]})
    one, two = rates("hit", "a hit", plan, rows, lambda row: bool(row["value"]))
    assert (one["value"], two["value"]) == (0.2, 0.6)
    assert "mcnemar_p" not in one
    assert two["transitions"] == {"both": 0, "before_only": 1, "after_only": 3, "neither": 1}
    assert two["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)
    first, second = means("size", "a size", plan, rows, lambda row: row["value"])
    assert first["value"] == pytest.approx(0.2)
    assert second["change"]["value"] == pytest.approx(0.4)
    missing = means("size", "a size", plan, rows_of({"first": [0.0]}), lambda row: None)
    assert missing[0]["value"] is None
    assert missing[0]["reason"]


def test_seeds_agree_fully_when_features_are_alike() -> None:
    rows = {"v": [{"sample_id": name, "prompt": scene, "variant": "v"} for name, scene in ("a1", "b1", "c2")]}
    features = {("a", "v"): np.array([1.0, 0]), ("b", "v"): np.array([1.0, 1.0]), ("c", "v"): np.array([1.0, 0])}
    found = consensus(rows, features)
    assert found["a", "v"] == found["b", "v"] == pytest.approx(2**-0.5)
    assert found["c", "v"] is None


def test_localiser_overlap() -> None:
    from erasure.assets.build.localiser import Found, overlap, table

    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True
    assert overlap(left, left) == overlap(~left | left, left | ~left) == 1
    assert overlap(left, ~left) == 0
    styles = ("noto", "pixel", "ink", "contour", "sepia")
    found = [Found(i, style, 1 + i % 2, 0.5) for i, style in enumerate(styles * 2)]
    assert table(found).count("0.500 (0.500-0.500)") == 8


def test_the_localiser_finds_objects(canvas: Any) -> None:
    from erasure.assets.build.localiser import overlap

    drawn = render(Scene(("cat",), "noto", "blue"))
    masks = canvas.localize(Image.fromarray(drawn.image), "cat").masks
    assert overlap(masks[0, 0], torch.from_numpy(drawn.masks[0])) > 0.7


def test_the_report_shows_every_way(run: Any) -> None:
    suite, folder, _ = run
    page = (Path(folder) / "report.html").read_text()
    for variant in get(suite).variant_names():
        assert variant.replace("_", " ").capitalize() in page
