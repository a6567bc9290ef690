"""Train and write `canvas-turbo`: a LoRA with which `canvas-sd` draws in one step, without guidance.

It is distilled by the loop and the losses of the strategy `sfd`, with no concept to forget: a LoRA draws in one step,
a second one learns what that draws, and the model itself, guided as it is made for, says what would be better.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor

import erasure
from erasure.assets import ROOT
from erasure.assets import path as embedded
from erasure.assets.build.evaluate import sheet
from erasure.assets.build.loop import log
from erasure.assets.facts import FILE
from erasure.assets.scenes import captions
from erasure.assets.world import OBJECTS, STYLES, noun_phrase
from erasure.backbones import Backbone, backbone_for
from erasure.eval.detectors import CanvasJudge
from erasure.files import write_json
from erasure.interop import scopes
from erasure.interop.one_step import OneStepScheduler, sampled_once
from erasure.strategies.denoising import denoiser_student
from erasure.text.encodings import Reader
from erasure.training.distillation import Guiding, Kind, ScoreDistillation
from erasure.training.generator import OneStepGenerator, one_step
from erasure.training.loop import Trainer, make_accelerator
from erasure.training.run import Run
from erasure.training.states import Scene
from erasure.training.student import Student
from erasure.training.trajectories import rolling_out
from erasure.training.turns import Descent

NAME = "canvas-turbo"
WEIGHTS = "pytorch_lora_weights.safetensors"
LEVEL = 900
"""Noise level that the generator is told: the highest at which the model's answer still depends on the noise."""
LEVELS = (20, 980)
"""Noise levels that images are noised to while it learns (Zhou et al. 2024)."""
GUIDANCE = 2.0
"""Scale of guidance of the teacher: what `canvas-sd` is made for."""
RANK = 11
"""Rank of the LoRA: its file stays below 1 MB."""
CAPTIONS = 1500
"""Prompts that it learns on."""
EVERY = 50
"""Updates between two measurements."""


def train(
    work: Path, steps: int, batch: int = 8, lr: float = 4e-4, fake_lr: float = 1e-3, alpha: float = 1.2,
    head_start: int = 20, seed: int = 7,
) -> None:  # fmt: skip
    """Distil until `steps` updates are done, from the last checkpoint in `work` on, and note measurements in a log.

    Args:
        work: Where checkpoints, the log and the result go.
        steps: Updates of the model of what is drawn.
        batch: Images in each.
        lr: Learning rate of the generator.
        fake_lr: Learning rate of the other LoRA.
        alpha: Of the loss, see `distillation.identity`.
        head_start: Updates in which the generator waits for the other LoRA.
        seed: Of everything random.
    """
    backbone = backbone_for(erasure.load_pipeline("canvas-sd", device="cpu"))
    folder = work / NAME
    options = {"batch": batch, "lr": lr, "fake_lr": fake_lr, "alpha": alpha, "head_start": head_start, "rank": RANK,
               "level": LEVEL, "guidance": GUIDANCE, "captions": CAPTIONS}  # fmt: skip
    run = Run(checkpoints=folder, save_every=10, validate_every=EVERY)
    scenes = [Scene(text) for text in captions(CAPTIONS, seed)]
    prompts = Reader(backbone).read(["", *(scene.prompt for scene in scenes)])
    generator, fake = student(backbone, seed), student(backbone, seed + 1)
    source = OneStepGenerator(backbone, scenes, prompts, generator, LEVEL, LEVELS, seed)
    method = ScoreDistillation(
        kinds=[Kind("remain", source, batch, 1.0, 1.0)], generator=generator, fake=fake, alpha=alpha,
        guiding=Guiding(teacher=GUIDANCE), seed=seed, since=head_start,
    )  # fmt: skip
    descent = Descent(lr=lr, betas=(0.0, 0.999), clip=1.0, warmup=20)
    turns = method.turns(descent, Descent(lr=fake_lr, betas=(0.0, 0.999), clip=1.0, warmup=20))
    average = EMAModel(generator.parameters(), decay=0.98)
    started = time.perf_counter()

    def measured(update: int) -> None:
        average.store(generator.parameters())
        average.copy_to(generator.parameters())
        found = measure(backbone, generator)
        average.restore(generator.parameters())
        log(work / f"{NAME}.jsonl", step=update, seconds=time.perf_counter() - started, **found)

    accelerator = make_accelerator(run, backbone.device)
    with run.opened({"asset": NAME, "seed": seed, **options}), scopes.frozen(backbone.denoiser), rolling_out(backbone):
        Trainer(
            turns=turns, prepare=method.prepare, steps=steps, seed=seed, run=run, accelerator=accelerator,
            validate=measured, before=lambda _update: average.step(generator.parameters()),
            parts={"average": average},
        ).train(lambda _share: None)  # fmt: skip
    average.copy_to(generator.parameters())
    write_json(work / f"{NAME}.options.json", {"steps": steps, **options})
    save_file(lora(generator), work / f"{NAME}.safetensors", metadata={"format": "pt"})


def student(backbone: Backbone, seed: int) -> Student:
    """A LoRA on all linear layers of the denoiser."""
    return denoiser_student(backbone, "all", RANK, torch.Generator().manual_seed(seed))


def lora(generator: Student) -> dict[str, Tensor]:
    """The tensors of a LoRA file."""
    return generator.edits("unet").lora_state_dict(kohya=False)


def export(work: Path, out: Path = ROOT) -> Path:
    """Write `canvas-turbo` from what `train` left in `work`; the record of what it can do is empty until `record`."""
    folder = out / NAME
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes((work / f"{NAME}.safetensors").read_bytes())
    options = json.loads((work / f"{NAME}.options.json").read_text())
    rows = [json.loads(row) for row in (work / f"{NAME}.jsonl").read_text().splitlines()]
    described = {
        "model": "canvas-sd",
        "weights": WEIGHTS,
        "sampling": {"steps": 1, "guidance": 1.0, "level": options["level"]},
        "training": {
            "hardware": "1 CPU core", "steps": options["steps"], "hours": round(rows[-1]["seconds"] / 3600, 2),
            "options": options, "curve": rows, "accuracy": {},
        },
    }  # fmt: skip
    write_json(folder / FILE, described)
    return folder


def load(pipe: StableDiffusionPipeline, folder: Path | None = None) -> None:
    """Make a pipeline of `canvas-sd` draw in one step, as users do: the LoRA, and a sampler that ends in one step.

    Args:
        pipe: The pipeline. Call it with `num_inference_steps=1, guidance_scale=1`.
        folder: Of the LoRA; the embedded one when left out.
    """
    folder = embedded(NAME) if folder is None else folder
    level = json.loads((folder / FILE).read_text())["sampling"]["level"]
    pipe.load_lora_weights(str(folder), weight_name=WEIGHTS)
    pipe.scheduler = OneStepScheduler.in_place_of(pipe.scheduler, level)


def record(seeds: int = 2, grid: Path | None = None, out: Path = ROOT) -> dict[str, float]:
    """Draw every object in every style through a stock pipeline, and record what the judge sees.

    Beside it stands what the model itself draws in one step at the same level.

    Args:
        seeds: Images of each object in each style.
        grid: File of a contact sheet.
        out: Where the folder of the LoRA is.
    """
    pipe = StableDiffusionPipeline.from_pretrained(embedded("canvas-sd"))
    pipe.set_progress_bar_config(disable=True)
    plan = [(name, style) for _ in range(seeds) for name in OBJECTS for style in STYLES]
    prompts = [f"{noun_phrase(name)} in {style} style" for name, style in plan]
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    figures: dict[str, float] = {}
    for kind in ("without", ""):
        if not kind:
            load(pipe, out / NAME)
        latents = []
        with sampled_once(pipe, LEVEL):
            for first in range(0, len(plan), 24):
                rows = range(first, min(first + 24, len(plan)))
                generators = [torch.Generator().manual_seed(20_000 + row) for row in rows]
                latents.append(pipe([prompts[row] for row in rows], generator=generators, **call).images)
        found = judged(backbone_for(pipe), torch.cat(latents), plan, None if kind else grid)
        figures |= {f"{kind}_{name}" if kind else name: round(value, 4) for name, value in found.items()}
    described = json.loads((out / NAME / FILE).read_text())
    described["training"]["accuracy"] = figures
    write_json(out / NAME / FILE, described)
    return figures


@torch.no_grad()
def measure(backbone: Backbone, generator: Student | None = None, *, grid: Path | None = None) -> dict[str, float]:
    """Draw every object in every style in one step, and say what the judge sees.

    `spread` is the standard deviation of the latents, and `sharpness` that of differences between neighbours: both are
    lower than the teacher's where images are blurred, which the judge hardly minds.

    Args:
        backbone: Of `canvas-sd`.
        generator: What draws; the model itself when left out.
        grid: File of a contact sheet.
    """
    plan = [(name, style) for name in OBJECTS for style in STYLES]
    told = backbone.encode([f"{noun_phrase(name)} in {style} style" for name, style in plan])
    noise = backbone.noise([1000 + index for index in range(len(plan))])
    if generator is None:
        latents = one_step(backbone, noise, LEVEL, told)
    else:
        with generator.active():
            latents = one_step(backbone, noise, LEVEL, told)
    return judged(backbone, latents, plan, grid)


@torch.no_grad()
def judged(
    backbone: Backbone, latents: Tensor, plan: Sequence[tuple[str, str]], grid: Path | None = None
) -> dict[str, float]:
    """Tell what the judge sees in clean latents of objects in styles; see `measure`."""
    pixels = torch.cat([backbone.decode(part) for part in latents.split(24)])
    images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
    if grid is not None:
        sheet(images, len(STYLES) * 2).save(grid)
    seen = CanvasJudge()(images)
    steps = torch.cat([latents.diff(dim=2).flatten(), latents.diff(dim=3).flatten()])
    return {
        "object": float(np.mean([j.object == name for j, (name, _) in zip(seen, plan, strict=True)])),
        "style": float(np.mean([j.style == style for j, (_, style) in zip(seen, plan, strict=True)])),
        "spread": float(latents.std()),
        "sharpness": float(steps.std()),
    }
