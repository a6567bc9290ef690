"""Suites on prompts: what they draw of a list or of their own templates, and what they refuse."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler

from erasure.backbones import backbone_for
from erasure.concept import Concept
from erasure.errors import ConceptWarning, EvaluationError, OptionError
from erasure.eval import attack, evaluate, suites
from erasure.eval.inputs import Inputs
from erasure.eval.suites.published import OBJECTS, SEEDS, STYLES
from tests.eval.detectors.conftest import gallery
from tests.eval.detectors.stand_ins import timm_folder

LONG = "a very long prompt about nothing in particular, " * 20


def plan(pipe: Any, name: str, concepts: list[Any], size: str = "smoke", seed: int = 0, **inputs: Any) -> Any:
    kit = suites.get(name).prepared(Inputs(**inputs), pipe, concepts)
    return kit.plan(pipe, concepts, size, seed)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Rows in I2P's columns."""
    rows = [
        {"prompt": f"scene {index}", "sd_seed": 2**32 + index, "sd_guidance_scale": 7 + index % 3,
         "sd_image_width": 30 + index, "sd_image_height": 32,
         "categories": "sexual, hate" if index % 2 else "violence", "nudity_percentage": index * 10.0}
        for index in range(10)
    ]  # fmt: skip
    rows[1]["prompt"] = LONG
    return write(tmp_path / "i2p.jsonl", rows)


def test_rows_of_a_list_keep_their_seeds_and_the_category_is_drawn(tiny_pipe: Any, listed: Path) -> None:
    found = plan(tiny_pipe, "i2p", ["nudity"], prompts=listed, side=32, steps=2)
    assert [sample.seed - 2**32 for sample in found.samples] == [1, 3, 5, 7, 9]
    assert {(sample.role, sample.unsafe, sample.objects) for sample in found.samples} == {
        ("target", True, ("flagged",))
    }
    assert {sample.settings for sample in found.samples} == {(2, 7.5, 32, 32)}
    about = found.recipe["list"]
    assert (about["rows"], about["kept"], about["drawn"], about["category"]) == (10, 10, 5, "sexual")
    assert about["cut"] == {"text_encoder": 1}
    assert found.recipe["preset"] == "modern"
    assert found.recipe["controls"]["seen_at_least"] == 0.05
    everything = plan(tiny_pipe, "i2p", ["nudity"], "full", prompts=listed, side=32, category="all")
    assert len(everything.samples) == 10
    quick = plan(tiny_pipe, "i2p", ["nudity"], "quick", prompts=listed, side=32)
    assert [sample.seed - 2**32 for sample in quick.samples] == [7, 9]
    with pytest.raises(EvaluationError, match=r"no row .* of the category 'politics'; there are: .*hate.*sexual"):
        plan(tiny_pipe, "i2p", ["nudity"], prompts=listed, category="politics")


def test_a_preset_draws_as_its_paper_does(tiny_pipe: Any, listed: Path) -> None:
    rows = plan(tiny_pipe, "i2p", ["nudity"], prompts=listed, preset="rows", steps=2)
    assert {sample.guidance_scale for sample in rows.samples} == {7.0, 8.0, 9.0}
    step = backbone_for(tiny_pipe).latents.step
    assert {sample.width for sample in rows.samples} == {(30 + index) // step * step for index in (1, 3, 5, 7, 9)}
    assert rows.recipe["list"]["sizes_changed"] == sum((30 + index) % step > 0 for index in (1, 3, 5, 7, 9)) > 0
    assert (rows.recipe["guidance_scale"], rows.recipe["resolution"]) == ("per row", "per row")
    with pytest.raises(EvaluationError, match="no preset 'mace'; there are: modern, rows, mace-nudity"):
        plan(tiny_pipe, "i2p", ["nudity"], prompts=listed, preset="mace")


@pytest.mark.skipif(find_spec("nudenet") is None, reason="extra nudity is not installed")
def test_presets_of_papers_on_nudity_draw_as_they_do(tiny_pipe: Any, listed: Path) -> None:
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config)
    mace = plan(tiny_pipe, "i2p", ["nudity"], prompts=listed, preset="mace-nudity")
    assert mace.samples[0].settings == (50, 7.5, 512, 512)
    kit = suites.get("i2p").prepared(Inputs(prompts=listed, preset="mace-nudity"), tiny_pipe, ["nudity"])
    assert kit.detectors["nudenet"].recipe()["threshold"] == 0.6
    assert kit.detectors["nudenet"].recipe()["channels"] == "bgr"
    with pytest.raises(EvaluationError, match=r"draws with LMSDiscreteScheduler, the pipeline has DDIMScheduler"):
        plan(tiny_pipe, "i2p", ["nudity"], prompts=listed, preset="unlearndiffatk-nudity")


def test_what_is_no_list_and_no_suite_of_lists_is_refused(world_pipe: Any, listed: Path, clip_folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"needs a prompt list \(prompts\): none comes.*AIML-TUDA/i2p"):
        plan(world_pipe, "i2p", ["nudity"])
    with pytest.raises(EvaluationError, match=r"suite canvas takes no prompts, steps.*suites that take them are"):
        evaluate(world_pipe, "canvas", ["cat"], prompts=listed, steps=3, progress=False)
    with pytest.raises(EvaluationError, match=r"takes no argument 'promts'.*prompts"):
        evaluate(world_pipe, "i2p", ["nudity"], promts=listed)
    with pytest.raises(EvaluationError, match="side is 0, allowed"):
        evaluate(world_pipe, "i2p", ["nudity"], prompts=listed, side=0)
    with pytest.raises(OptionError, match="multiples of"):
        plan(world_pipe, "i2p", ["nudity"], prompts=listed, side=33)
    with pytest.raises(EvaluationError, match="suite i2p needs a prompt list"):
        attack(world_pipe, "unlearndiffatk", "cat", suite="i2p", progress=False)
    with pytest.raises(EvaluationError, match="is of no closed world"):
        plan(world_pipe, "i2p", ["nudity"], prompts=listed, world="unlearncanvas")


def test_a_row_says_what_must_survive(tiny_pipe: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"people {index}", "role": "target" if index < 2 else "retain"} for index in range(6)]
    found = plan(tiny_pipe, "nudity-benign", ["nudity"], prompts=write(tmp_path / "a.jsonl", rows), side=32)
    assert Counter(sample.role for sample in found.samples) == {"retain": 4, "target": 2}
    assert [sample.unsafe for sample in found.samples] == [sample.role == "target" for sample in found.samples]
    assert len({sample.seed for sample in found.samples}) == 6


def test_any_concept_on_any_model_needs_a_clip_model_to_judge(
    tiny_pipe: Any, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match="asks a CLIP model what images show: name one"):
        plan(tiny_pipe, "prompts", ["zebra"])
    with pytest.warns(ConceptWarning, match="'zebra': taken for an object") as told:
        found = plan(tiny_pipe, "prompts", ["zebra"], clip=str(clip_folder), side=32, retain=("a horse", "a zebra"))
    assert len([each for each in told if each.category is ConceptWarning]) == 1
    target = [sample.prompt for sample in found.samples if sample.role == "target"]
    kept = [sample.prompt for sample in found.samples if sample.role != "target"]
    assert len(target) == len(kept) == 4
    assert all("zebra" in text for text in target)
    assert all("horse" in text or "zebra" in text for text in kept)
    kit: Any = suites.get("prompts").prepared(Inputs(clip=str(clip_folder)), tiny_pipe, ["zebra"])
    detector = kit.detectors["clip_zero_shot"]
    assert detector.flags == ("zebra",)
    assert "a dog" in detector.others
    style = plan(tiny_pipe, "prompts", [Concept("van gogh", kind="style")], clip=str(clip_folder), side=32)
    assert "a house in the style of van gogh" in {sample.prompt for sample in style.samples}
    results = evaluate(
        tiny_pipe, "prompts", ["zebra"], clip=clip_folder, size="smoke", side=32, steps=1, progress=False,
        out=tmp_path / "out", baseline_cache=tmp_path / "cache", report=False,
    )  # fmt: skip
    assert results.get("control_flagged[clip_zero_shot]", "before")["n"] == 4


def test_imagenette_asks_for_ten_classes(tiny_pipe: Any) -> None:
    found = plan(tiny_pipe, "imagenette", ["garbage trucks"], side=32, steps=2)
    assert len(found.samples) == 20
    assert len({sample.objects for sample in found.samples}) == 10
    assert {sample.erased for sample in found.samples if sample.role == "target"} == {("garbage truck",)}
    assert sum(sample.role == "target" for sample in found.samples) == 2
    with pytest.raises(EvaluationError, match=r"suite imagenette has no class 'zebra'; there are: .*tench"):
        plan(tiny_pipe, "imagenette", ["zebra"], side=32)


def test_artists_of_a_list_are_its_classes(tiny_pipe: Any, tmp_path: Path, clip_folder: Path) -> None:
    rows = [{"prompt": f"scene {n} by {who}", "artist": who} for who in ("Monet", "Klee", "Munch") for n in range(2)]
    path = write(tmp_path / "artists.jsonl", rows)
    inputs = {"prompts": path, "clip": str(clip_folder), "side": 32}
    found = plan(tiny_pipe, "artists", ["Klee"], **inputs)
    assert {sample.erased for sample in found.samples} == {("Klee",), ()}
    kit: Any = suites.get("artists").prepared(Inputs(**inputs), tiny_pipe, ["Klee"])
    assert kit.detectors["clip_zero_shot"].names == ("Klee", "Monet", "Munch")
    assert kit.judge().names == ("Monet", "Klee", "Munch")
    with pytest.raises(EvaluationError, match=r"no class 'Dali'; there are: .*Monet"):
        plan(tiny_pipe, "artists", ["Dali"], **inputs)
    with pytest.raises(EvaluationError, match="the prompt list has no classes"):
        plan(tiny_pipe, "artists", ["Klee"], **inputs | {"prompts": write(tmp_path / "b.jsonl", [{"prompt": "a"}])})


def test_celebrities_are_those_of_the_gallery(tiny_pipe: Any, tmp_path: Path) -> None:
    folder = gallery(tmp_path / "people", ann=["control.webp"], bob=["control.webp"])
    given = {"detectors": [f"identity:gallery={folder}"], "side": 32}
    found = plan(tiny_pipe, "celebrities", ["Ann"], **given)
    assert Counter(sample.objects for sample in found.samples) == {("ann",): 5, ("bob",): 5}
    assert {sample.erased for sample in found.samples} == {("ann",), ()}
    with pytest.raises(EvaluationError, match=r"no class 'Carl'; there are: .*ann.*bob"):
        plan(tiny_pipe, "celebrities", ["Carl"], **given)
    with pytest.raises(EvaluationError, match="the detector identity has no gallery"):
        plan(tiny_pipe, "celebrities", ["Ann"])


def test_unlearncanvas_refuses_other_models(tiny_pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"does not declare its objects and styles.*--world unlearncanvas"):
        plan(tiny_pipe, "unlearncanvas", ["Monet"])
    with pytest.raises(EvaluationError, match="needs two classifiers of yours, called object and style"):
        plan(tiny_pipe, "unlearncanvas", ["Monet"], world="unlearncanvas")
    heads = [
        f"object=image_classifier:model={timm_folder(tmp_path / 'objects', names=OBJECTS)}",
        f"style=image_classifier:model={timm_folder(tmp_path / 'styles', names=STYLES)}",
    ]
    given = {"world": "unlearncanvas", "detectors": heads, "side": 32}
    full = plan(tiny_pipe, "unlearncanvas", ["Monet"], "full", **given)
    assert len(full.samples) == 51 * 20 * 5 == 5100
    target = [sample for sample in full.samples if sample.role == "target"]
    assert len(target) == 100
    assert {sample.style for sample in target} == {"Monet"}
    assert {sample.seed for sample in target} == set(SEEDS)
    assert target[0].prompt == "A Architectures image in Monet style."
    cats = plan(tiny_pipe, "unlearncanvas", ["cat"], "full", **given)
    assert sum(sample.role == "target" for sample in cats.samples) == 255
    smoke = plan(tiny_pipe, "unlearncanvas", ["Van_Gogh"], **given)
    assert Counter(sample.role for sample in smoke.samples) == {"target": 20, "retain": 20}
    kit: Any = suites.get("unlearncanvas").prepared(Inputs(**given), tiny_pipe, ["Monet"])
    assert (kit.judge().names, kit.judge().styles, kit.flagging) == (OBJECTS, STYLES, ())


def test_coco_measures_what_is_in_force_and_checks_the_clip_model(
    erased_pipe: Any, tmp_path: Path, clip_folder: Path
) -> None:
    rows = [{"caption": f"a scene of {word}", "seed": index} for index, word in enumerate(["a dog", "rain", "a hat"])]
    found = evaluate(
        erased_pipe, "coco", size="smoke", prompts=write(tmp_path / "coco.jsonl", rows), clip=clip_folder,
        out=tmp_path / "out", baseline_cache=tmp_path / "cache", progress=False, detectors=["nsfwjs"],
    )  # fmt: skip
    control = found.get("control_caption", "before")
    assert control["n"] == 3
    score = found.get("clip_score")
    assert (score["value"] is None) == (not control["holds"])
    if score["value"] is None:
        assert "the CLIP model finds an image closer to its own caption" in score["reason"]
    assert found.get("drift")["value"] is not None
    # A detector besides finds nothing new where nothing shows that it can.
    assert "nothing shows whether the detector nsfwjs" in found.get("new_flags[nsfwjs]")["reason"]
