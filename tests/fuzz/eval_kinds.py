"""Files of evaluations and attacks, of the embedded world, and pictures."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kinds import kind
from PIL import Image

from erasure.eval.samples import Sample
from erasure.files import digest

# A list that is a folder is read by it: importing it takes longer than reading may.
with suppress(ImportError):
    import datasets  # noqa: F401

SAMPLES = [Sample(f"cat-{number}", "a cat", number, "target", ("cat",), "ink", ("cat",)) for number in range(2)]
JUDGED = {"object": "cat", "objects": ["cat"], "style": "ink", "shape": "cat", "object_score": 0.9}
SCORES: dict[str, Any] = {"judged": JUDGED, "clip_score": 0.25, "blank": False, "failures": {"drift": "no image"}}
RECIPE = {"suite": {"suite": "canvas"}, "samples": "abc", "erasures": [{"name": "cat", "strength": 1.0}]}
MADE_BY = {"attack": "unlearndiffatk", "size": "quick", "options": {"samples": 5}, "against": ["uce"]}


def png(side: int = 16) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


FINDING = {
    "flagged": False,
    "score": 0.2,
    "labels": ["neutral"],
    "scores": {"neutral": 0.8},
    "boxes": {},
    "reason": None,
}
SHARE = {"value": 1.0, "low": 0.5, "high": 1.0, "n": 4, "missing": 0, "worst": 1.0, "reason": None}
DETECTOR = {
    "label": "nsfwjs", "recipe": {"detector": "nsfwjs", "licence": "MIT", "threshold": 0.5, "known": True},
    "self_test": {"remark": "good"}, "controls": {"sensitivity": SHARE, "specificity": SHARE, "wrong": {}},
    "counts": "flags",
}  # fmt: skip


def row(sample: Sample, variant: str) -> dict[str, Any]:
    moved = {"pixel": 0.1, "feature": None} if variant == "after" else None
    return {**sample.row(), "variant": variant, **SCORES, "drift": moved, "seconds": 0.5,
            "detected": {"nsfwjs": FINDING}}  # fmt: skip


# Results -------------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> None:
    """As a user meets them: compared, and laid out for the terminal."""
    from erasure.cli.compare import layout
    from erasure.cli.eval import metric_table
    from erasure.eval import Results, compare

    results = Results.load(folder)
    layout(compare([results]))
    metric_table(results.to_dict()["metrics"])
    results.save(folder / "again")


@kind("results", "results.json", read=read_results)
def write_results(folder: Path) -> None:
    from erasure.eval import Results

    table = {"both": 1, "before_only": 0, "after_only": 9, "neither": 0}
    metrics: list[dict[str, Any]] = [
        {"name": name, "concept": "cat", "variant": side, "value": 0.5, "low": 0.4, "high": 0.6, "n": 10,
         "recipe": {"suite": "canvas", "metric": "a share"}}
        for name in ("UA", "drift") for side in ("before", "after")
    ]  # fmt: skip
    metrics[1] |= {"mcnemar_p": 1e-6, "transitions": table, "missing": 1}
    metrics[3] |= {"change": {"value": 0.1, "low": 0.0, "high": 0.2}, "value": None, "reason": "no image"}
    metrics[0] |= {"curve": {"0.5": 0.25, "0.75": 0.0}}
    erasure = {"name": "cat", "strategy": "uce", "strength": 0.5, "size_bytes": 1000, "seconds": 2.0}
    cost = {
        "seconds": 1.0, "seconds_per_image": {"before": None, "after": 0.2}, "peak_memory_mb": 1.0,
        "artifact_bytes": 1000, "erase_seconds": 2.0, "device": "cpu", "threads": 1, "cpus": 2,
    }  # fmt: skip
    model = {"name": "canvas-sd", "fingerprint": "f"}
    versions = {"torch": "2.6", "python": "3.11"}
    Results(
        "canvas",
        "quick",
        model,
        [erasure],
        metrics,
        cost,
        date="2026-01-31T12:00:00+00:00",
        versions=versions,
        detectors=[DETECTOR],
    ).save(folder)


def read_report(folder: Path) -> None:
    from erasure.eval import write_report

    assert write_report(folder).stat().st_size > 1000


@kind("report", "results.json", "samples.jsonl", "images/before/cat-0.png", read=read_report)
def write_report_folder(folder: Path) -> None:
    write_results(folder)
    rows = [row(sample, variant) for sample in SAMPLES for variant in ("before", "after")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for each in rows:
        path = folder / "images" / each["variant"] / f"{each['sample_id']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())


def read_measured(folder: Path) -> None:
    from erasure.eval.dossiers.reading import read_folder

    read_folder(folder, ["cat"])


@kind("audit", "audit.json", read=read_measured)
def write_audit(folder: Path) -> None:
    part = {"kind": "evaluation", "name": "canvas", "concept": None, "folder": "evaluation-canvas", "state": "done",
            "detail": ""}  # fmt: skip
    refused = {**part, "kind": "attack", "name": "typo", "concept": "cat", "state": "refused", "detail": "no list"}
    erasure = {"name": "cat", "strategy": "uce", "strength": 0.5, "fingerprint": "0" * 16}
    data = {"schema_version": 1, "model": {"name": "tiny"}, "erasures": [erasure], "parts": [part, refused]}
    (folder / "audit.json").write_text(json.dumps(data))
    (folder / "evaluation-canvas").mkdir()
    write_results(folder / "evaluation-canvas")


@kind("cell of a sweep", "cell.json", read=read_measured)
def write_cell(folder: Path) -> None:
    parts = [{"what": "evaluation-canvas", "state": "done", "reason": "", "seconds": 1.5},
             {"what": "attack-typo", "state": "failed", "reason": "out of memory", "seconds": 0.0}]  # fmt: skip
    (folder / "cell.json").write_text(json.dumps({"parts": parts}))
    (folder / "evaluation-canvas").mkdir()
    write_results(folder / "evaluation-canvas")


def read_sweep(folder: Path) -> None:
    from erasure.eval.sweeps.plan import SweepPlan

    plan = SweepPlan.read(folder / "sweep.toml")
    assert len({cell.folder for cell in plan.cells}) == len(plan.cells)


@kind("sweep", "sweep.toml", read=read_sweep)
def write_sweep(folder: Path) -> None:
    lines = [
        'models = ["canvas-sd"]', 'concepts = ["dog", "ink"]', "seeds = [0, 7]", 'suites = ["canvas"]',
        'methods = ["uce", { strategy = "uce", label = "b", options = { vocabulary = 0 } }]', "[groups]",
        'objects = ["dog"]',
    ]  # fmt: skip
    (folder / "sweep.toml").write_text("\n".join(lines) + "\n")


def read_list(folder: Path, name: str) -> None:
    from erasure.eval.sources import read_prompts

    read_prompts(folder / name).recipe()


@kind("prompt table", "list.csv", read=partial(read_list, name="list.csv"))
def write_prompt_table(folder: Path) -> None:
    lines = ["prompt,seed,categories", '"a cat, sitting",4290749014,"sexual, hate"', "a dog,7,", "NULL,8,hate"]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")


@kind("prompt lines", "list.jsonl", read=partial(read_list, name="list.jsonl"))
def write_prompt_lines(folder: Path) -> None:
    rows = [{"prompt": "a cat", "sd_seed": 2**63, "role": "target"}, {"prompt": None}, {"prompt": "a dog"}]
    (folder / "list.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


# Rows ----------------------------------------------------------------------------------------------------------------


def opened_table(folder: Path, attacks: bool = False) -> Any:
    from erasure.eval.processes import Processes
    from erasure.eval.run import opened
    from erasure.eval.schemas import AttackRow
    from erasure.eval.table import SampleTable

    def table(place: Path) -> SampleTable:
        if attacks:
            return SampleTable(place, SAMPLES, variants=("attack",), stem="attacks", schema=AttackRow)
        return SampleTable(place, SAMPLES)

    return opened(Processes(), table, RECIPE, folder)


def read_table(folder: Path) -> None:
    """Go on where it stopped."""
    with opened_table(folder) as table:
        for sample in SAMPLES:
            for variant in ("before", "after"):
                if (sample.sample_id, variant) not in table.rows:
                    table.append([row(sample, variant)], [np.ones(4, dtype=np.float32)])
        table.merge()
        table.load()
        assert all(len(rows) == len(SAMPLES) for rows in table.by_variant().values())


@kind("rows of an evaluation", "samples.jsonl", "features.jsonl", "recipe.json", read=read_table)
def write_table(folder: Path) -> None:
    with opened_table(folder) as table:
        rows = [row(sample, "before") for sample in SAMPLES]
        table.append(rows, [np.ones(4, dtype=np.float32)] * len(rows))


def read_attacks(folder: Path) -> None:
    from erasure.eval.cost import attack_cost
    from erasure.eval.evidence import Evidence
    from erasure.eval.metrics import METRICS
    from erasure.eval.metrics.attacked import original_control
    from erasure.eval.suites import Plan

    with opened_table(folder, attacks=True) as table:
        rows = table.by_variant().get("attack", [])
        plan = Plan("unlearndiffatk", "smoke", 0, (), ())
        evidence = Evidence(plan, {"after": rows}, controls=[original_control("cat", rows)])
        for name in ("pre_ASR", "ASR", "control_seen"):
            METRICS.get(name).compute(evidence)
        attack_cost(rows, [], 1.0)


@kind("rows of an attack", "attacks.jsonl", read=read_attacks)
def write_attacks(folder: Path) -> None:
    seen = {"judged": JUDGED, "shown": False}
    with opened_table(folder, attacks=True) as table:
        for sample in SAMPLES:
            outcome = {
                "before": seen, "text": "a c a t", "after": seen, "success": False, "texts": 1, "changed": 0, "cut": 0,
                "steps": 4, "losses": [0.5], "images": 2, "references": 1, "failures": {},
            }  # fmt: skip
            named = {**sample.row(), "variant": "attack", "concept": "cat"}
            table.append([{**named, **outcome, "seconds": 0.5}], [None])


def read_adversarial(folder: Path) -> None:
    from erasure.eval.attacks.prompts import read_prompts, write_prompts

    (folder / "again").mkdir()
    write_prompts(folder / "again", read_prompts(folder))


@kind("adversarial prompts", "adversarial.jsonl", read=read_adversarial)
def write_adversarial(folder: Path) -> None:
    from erasure.eval.attacks.prompts import AdversarialPrompt, write_prompts
    from erasure.eval.suites import Target

    target = Target("cat", "object", ("cat",))
    write_prompts(folder, [AdversarialPrompt(sample, "a c a t", target, MADE_BY) for sample in SAMPLES])


def read_stored(folder: Path) -> None:
    from erasure.eval.attacks.prompts import read_prompts

    for prompt in read_prompts(folder):
        assert prompt.attempt.call


STORED = ("adversarial/one.safetensors", "adversarial/one-0.png")


@kind("adversarial attempts", "adversarial.jsonl", *STORED, read=read_stored)
def write_stored(folder: Path) -> None:
    import torch
    from PIL import Image

    from erasure.eval.attacks.changes import AnotherTask, Resumed
    from erasure.eval.attacks.prompts import AdversarialPrompt, write_prompts
    from erasure.eval.attacks.stored import store
    from erasure.eval.attempts import Attempt
    from erasure.eval.suites import Target

    call = {
        "image": Image.new("RGB", (8, 8)), "strength": 0.5, "latents": torch.ones(1, 4),
        "callback_on_step_end": Resumed(1, torch.ones(1, 4)),
    }  # fmt: skip
    stored = store(Attempt(call, AnotherTask("Img2Img"), box=(0, 0, 4, 4)), folder, "one")
    target = Target("cat", "object", ("cat",))
    write_prompts(folder, [AdversarialPrompt(SAMPLES[0], None, target, MADE_BY, {}, stored)])


def cache_of(folder: Path) -> Any:
    from erasure.eval.drawings import DrawingCache

    return DrawingCache(folder, {"model": "model"}, judge={"judge": "judge"}, clip={"clip": "clip"})


CACHED = f"drawings/{digest({'model': 'model'})}"
ANSWERS = f"answers-{digest({'judge': 'judge'})}/{SAMPLES[0].key}.json"
FEATURES = f"clip-{digest({'clip': 'clip'})}/{SAMPLES[0].key}.json"


def read_cache(folder: Path) -> None:
    """A broken entry is made again: reading it raises nothing at all."""
    cache = cache_of(folder)
    found, image = cache.features(SAMPLES[0], 4), cache.image(SAMPLES[0])
    assert found is None or len(found[1]) == 4
    cache.answer(SAMPLES[0])
    assert image is None or image.mode == "RGB"


@kind(
    "cache of drawings", f"{CACHED}/{ANSWERS}", f"{CACHED}/{FEATURES}", f"{CACHED}/{SAMPLES[0].key}.png",
    read=read_cache, errors=(),
)  # fmt: skip
def write_cache(folder: Path) -> None:
    cache_of(folder).put_image(SAMPLES[0], png(64))
    from erasure.eval.scoring import KeptAnswer

    answer = KeptAnswer("cat", ["cat"], "ink", None, {"cat": 0.9}, {}, {})
    cache_of(folder).put_answer(SAMPLES[0], answer)
    cache_of(folder).put_features(SAMPLES[0], 0.5, np.ones(4, dtype=np.float32))


# Detectors and worlds ------------------------------------------------------------------------------------------------


def read_judge(folder: Path) -> None:
    from erasure.eval.detectors import CanvasJudge
    from erasure.eval.recipe import judge_fingerprint

    judge = CanvasJudge(folder)
    judge_fingerprint(judge)
    (found,) = judge([Image.new("RGB", (64, 64))])
    assert found.object in judge.object_names


@kind("judge", "config.json", "model.safetensors", read=read_judge)
def write_judge(folder: Path) -> None:
    from erasure.eval.detectors.canvas import JudgeNetwork, save_judge

    torch.manual_seed(0)
    save_judge(JudgeNetwork(3, 2), folder, ["cat", "dog", "gun"], ["ink", "noto"])


def read_classifier(folder: Path) -> None:
    from erasure.eval.detectors.classifiers import load_classifier

    used = load_classifier(folder)
    # Huge weights give NaN, which `ask` takes for missing.
    assert used.probabilities([Image.new("RGB", (16, 16))]).shape == (1, used.outputs)


@kind("image classifier", "config.json", "model.safetensors", read=read_classifier)
def write_classifier(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3)
    save_file({name: part.contiguous() for name, part in network.state_dict().items()}, folder / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 3, "label_names": ["cat", "dog", "gun"]}
    (folder / "config.json").write_text(json.dumps(config))


def read_eight_bits(folder: Path) -> None:
    from erasure.eval.detectors.weights import load_into, read_eight_bits

    load_into(torch.nn.Linear(3, 2), read_eight_bits(folder / "weights.safetensors"), "weights.safetensors")


@kind("weights in eight bits", "weights.safetensors", read=read_eight_bits)
def write_eight_bits(folder: Path) -> None:
    from safetensors.torch import save_file

    parts = {"weight": torch.ones(2, 3, dtype=torch.uint8), "bias": torch.zeros(2)}
    span = torch.tensor([-1.0, 0.01], dtype=torch.float64)
    save_file(parts | {"weight.range": span}, folder / "weights.safetensors")


def read_clip(folder: Path) -> None:
    from erasure.eval.metrics.clip_score import ClipModel

    model = ClipModel(folder)
    assert model.width > 0
    assert model.fingerprint


@kind("CLIP model", "open_clip_config.json", "open_clip_model.safetensors", read=read_clip)
def write_clip(folder: Path) -> None:
    from safetensors.torch import save_file

    shape = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1}, "text_cfg": {"width": 32, "layers": 1}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    save_file(
        {"visual.proj": torch.ones(4, 16), "logit_scale": torch.ones(())}, folder / "open_clip_model.safetensors"
    )


@kind("CLIP model of transformers", "config.json", "model.safetensors", read=read_clip)
def write_transformers_clip(folder: Path) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 16}))
    save_file({"logit_scale": torch.ones(())}, folder / "model.safetensors")


def read_world(folder: Path) -> None:
    from erasure import assets
    from erasure.eval.suites.canvas import CanvasSuite
    from erasure.world import World

    world = World.at(folder)
    world.concepts(["cat", "weapons"])
    if world.declared:
        assets.canvas(folder)
    CanvasSuite().plan(SimpleNamespace(name_or_path=str(folder)), ["cat"], "smoke", 0)


@kind("world", "canvas.json", read=read_world)
def write_world(folder: Path) -> None:
    from erasure import assets

    facts = assets.canvas()
    (folder / "canvas.json").write_text(json.dumps({key: facts[key] for key in facts if key != "training"}))


# Pictures ------------------------------------------------------------------------------------------------------------


def read_picture(folder: Path) -> None:
    from erasure.images import read_image, read_rgb
    from erasure.masks import read_masks

    assert read_rgb(folder / "picture.png").mode == "RGB"
    mask = read_image(folder / "picture.png")
    read_masks(mask, (mask.height, mask.width), 1)


@kind("picture", "picture.png", read=read_picture)
def write_picture(folder: Path) -> None:
    (folder / "picture.png").write_bytes(png())


def read_picture_record(folder: Path) -> None:
    """As a user meets it: shown."""
    from erasure.cli.records import show_record
    from erasure.cli.terminal import Terminal

    show_record(folder / "drawn.png", Terminal())


@kind("record of a picture", "drawn.png", read=read_picture_record)
def write_picture_record(folder: Path) -> None:
    from erasure.images import png as with_record

    erasures: list[Any] = [{"name": "cat", "strategy": "uce", "fingerprint": "ab", "strength": 0.5}]
    record: Any = {
        "format": 1, "version": "0.1.0", "command": "generate", "model": "canvas-sd", "fingerprint": "f", "seed": 3,
        "erasures": erasures, "prompt": "a cat", "settings": {"num_inference_steps": 4},
    }  # fmt: skip
    (folder / "drawn.png").write_bytes(with_record(Image.new("RGB", (16, 16)), record))
