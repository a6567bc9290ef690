"""Measure the shipped models against what the project demands of them, and write the figures into `canvas.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from erasure.assets import facts_of, path
from erasure.assets.facts import FILE
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


def generate(pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], batch: int = 24) -> list[Image.Image]:
    """One image per prompt and seed at the shipped settings."""
    return generate_from(pipe, {"prompt": prompts}, seeds, batch)


def generate_from(
    pipe: DiffusionPipeline, inputs: Mapping[str, list[str] | Tensor], seeds: list[int], batch: int = 24
) -> list[Image.Image]:
    """One image per row of inputs and seed at the shipped settings.

    Args:
        pipe: A model of Canvas.
        inputs: Prompts or their encodings, by the name of the pipeline's argument.
        seeds: Of the noise.
        batch: Images at once.
    """
    settings = dict(facts_of(pipe.name_or_path)["generation"])
    images: list[Image.Image] = []
    for first in range(0, len(seeds), batch):
        own = seeds[first : first + batch]
        generators = [torch.Generator().manual_seed(seed) for seed in own]
        rows = {name: values[first : first + batch] for name, values in inputs.items()}
        if "true_cfg_scale" in settings:
            rows["negative_prompt"] = [""] * len(own)
        images += pipe(**rows, generator=generators, **settings).images
    return images


def load(model: str | Path) -> DiffusionPipeline:
    """A model of Canvas in float32: an embedded one by its name, or a folder."""
    folder = model if Path(model).is_dir() else path(str(model))
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate(
    seeds: int = 2, pairs: int = 120, grids: Path | None = None, model: str | Path = "canvas-sd"
) -> dict[str, float]:
    """Measure a model, and record the figures in its `canvas.json`.

    Args:
        seeds: Images of each object in each style.
        pairs: Images of two objects.
        grids: A folder for contact sheets to look at.
        model: Name of an embedded model, or a folder.
    """
    pipe = load(model)
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
    # The core's own time: what else the machine does is not in it.
    started = time.process_time()
    generate(pipe, ["a dog in ink style"], [0])
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    figures = {
        **paths_of_prompts(pipe),
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
    file = Path(pipe.name_or_path) / FILE
    described = json.loads(file.read_text())
    described["training"]["accuracy"] = figures
    file.write_text(json.dumps(described, indent=2) + "\n")
    if grids is not None:
        grids.mkdir(parents=True, exist_ok=True)
        sheet(images[: len(OBJECTS) * len(STYLES)], len(STYLES)).save(grids / "objects-by-style.png")
        sheet(together[:40], 8).save(grids / "pairs.png")
    return figures


def paths_of_prompts(pipe: DiffusionPipeline) -> dict[str, float]:
    """Measure how words reach the picture: their attention in `canvas-sd`, each part of an encoding in the others."""
    from erasure.assets.build import doors, words

    if isinstance(pipe, StableDiffusionPipeline):
        return words.figures(words.attention(pipe, words.plan()))
    return doors.figures(pipe, words.plan()[::6])


def sheet(images: list[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    """A contact sheet, row by row."""
    side = images[0].width * scale
    rows = -(-len(images) // columns)
    made = Image.new("RGB", (columns * side, rows * side), "white")
    for index, image in enumerate(images):
        place = (index % columns * side, index // columns * side)
        made.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return made
