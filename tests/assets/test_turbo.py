"""The embedded one-step LoRA, loaded as its users load it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from erasure import assets
from erasure.assets.build import turbo
from erasure.assets.world import OBJECTS, STYLES, noun_phrase
from erasure.eval.detectors import CanvasJudge


def test_it_draws_in_one_step() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(assets.path("canvas-sd"))
    pipe.set_progress_bar_config(disable=True)
    turbo.load(pipe)
    plan = [(name, STYLES[row % len(STYLES)]) for row, name in enumerate(OBJECTS)]
    prompts = [f"{noun_phrase(name)} in {style} style" for name, style in plan]
    generators = [torch.Generator().manual_seed(row) for row in range(len(plan))]
    seen = CanvasJudge()(
        pipe(prompts, num_inference_steps=1, guidance_scale=1.0, generator=generators).images
    )  # fmt: skip
    assert np.mean([found.object == name for found, (name, _) in zip(seen, plan, strict=True)]) >= 0.85
    assert np.mean([found.style == style for found, (_, style) in zip(seen, plan, strict=True)]) >= 0.85


def test_its_record_says_what_it_adds() -> None:
    """The model itself draws every object in one step as well, but blurred."""
    found: Any = assets.canvas(turbo.NAME)
    figures = found["training"]["accuracy"]
    assert min(figures["object"], figures["style"]) >= 0.85
    assert figures["sharpness"] > 1.3 * figures["without_sharpness"]
    assert (assets.path(turbo.NAME) / turbo.WEIGHTS).stat().st_size < 1_000_000
    assert found["sampling"] == {"steps": 1, "guidance": 1.0, "level": turbo.LEVEL}
