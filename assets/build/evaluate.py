"""Measure the shipped models against what the project demands of them, and write the figures into `canvas.json`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from erasure.assets import path
from erasure.assets.scenes import render, sample_scene
from erasure.assets.world import OBJECTS, STYLES, noun_phrase
from erasure.eval.detectors import CanvasJudge


def judge_accuracy(judge: CanvasJudge, scenes: int, seed: int = 77_000) -> dict[str, float]:
    """Accuracy on fresh renders: object, style and shape on one-object scenes, both objects on two-object scenes."""
    rng = np.random.default_rng(seed)
    single = [sample_scene(rng, pairs=0, empty=0) for _ in range(scenes)]
    double = [sample_scene(rng, pairs=1, empty=0) for _ in range(scenes)]
    seen = judge([Image.fromarray(render(scene).image) for scene in single])
    both = judge([Image.fromarray(render(scene).image) for scene in double])
    return {
        "judge_object": float(np.mean([j.object == s.objects[0] for j, s in zip(seen, single, strict=True)])),
        "judge_style": float(np.mean([j.style == s.style for j, s in zip(seen, single, strict=True)])),
        "judge_shape": float(np.mean([j.shape == s.objects[0] for j, s in zip(seen, single, strict=True)])),
        "judge_both": float(np.mean([set(s.objects) <= set(j.objects) for j, s in zip(both, double, strict=True)])),
    }


def generate(
    pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int], batch: int = 24
) -> list[Image.Image]:
    """One image per prompt and seed at the shipped settings."""
    settings = json.loads((path("canvas-sd") / "canvas.json").read_text())["generation"]
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch]]
        images += pipe(prompts[first : first + batch], generator=generators, **settings).images
    return images


def evaluate(seeds: int = 2, pairs: int = 120, grids: Path | None = None) -> dict[str, float]:
    """Measure and record. `grids` is a folder for contact sheets to look at."""
    pipe = StableDiffusionPipeline.from_pretrained(path("canvas-sd"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = CanvasJudge()
    plan = [(name, style, seed) for seed in range(seeds) for name in OBJECTS for style in STYLES]
    prompts = [f"{noun_phrase(name)} in {style} style" for name, style, _ in plan]
    images = generate(pipe, prompts, [1000 + index for index in range(len(plan))])
    judged = judge(images)
    rng = np.random.default_rng(5)
    drawn = [sample_scene(rng, pairs=1, empty=0) for _ in range(pairs)]
    texts = [f"{noun_phrase(s.objects[0])} and {noun_phrase(s.objects[1])} in {s.style} style" for s in drawn]
    together = generate(pipe, texts, [5000 + index for index in range(pairs)])
    found = [set(s.objects) <= set(j.objects) for s, j in zip(drawn, judge(together), strict=True)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generate(pipe, ["a cat in noto style"], [0])
    started = time.perf_counter()
    generate(pipe, ["a dog in ink style"], [0])
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    from erasure.assets.build import words

    figures = {
        **words.figures(words.attention(pipe, words.plan())),
        **judge_accuracy(judge, 1000),
        "object": float(np.mean([j.object == name for j, (name, _, _) in zip(judged, plan, strict=True)])),
        "style": float(np.mean([j.style == style for j, (_, style, _) in zip(judged, plan, strict=True)])),
        "shape": float(np.mean([j.shape == name for j, (name, _, _) in zip(judged, plan, strict=True)])),
        "both_objects": float(np.mean(found)),
        "seconds_per_image_one_core": seconds,
        **{
            f"style_{s}": float(np.mean([j.style == s for j, row in zip(judged, plan, strict=True) if row[1] == s]))
            for s in STYLES
        },
    }
    figures = {name: round(value, 4) for name, value in figures.items()}
    file = path("canvas-sd") / "canvas.json"
    described = json.loads(file.read_text())
    described["training"]["accuracy"] = figures
    file.write_text(json.dumps(described, indent=2) + "\n")
    if grids is not None:
        grids.mkdir(parents=True, exist_ok=True)
        sheet(images[: len(OBJECTS) * len(STYLES)], len(STYLES)).save(grids / "objects-by-style.png")
        sheet(together[:40], 8).save(grids / "pairs.png")
    return figures


def sheet(images: list[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    """A contact sheet, row by row."""
    side = images[0].width * scale
    rows = -(-len(images) // columns)
    made = Image.new("RGB", (columns * side, rows * side), "white")
    for index, image in enumerate(images):
        place = (index % columns * side, index // columns * side)
        made.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return made
