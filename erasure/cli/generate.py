"""`erasure generate`: draw images, with or without erasures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erasure.cli.models import (
    ErasedModelOptions,
    attach,
    check_seeds,
    check_strengths,
    load_erasures,
    open_model,
)
from erasure.cli.terminal import Terminal, UsageError, output_folder, parse, process
from erasure.world import World

if TYPE_CHECKING:
    from erasure.interop.protocols import Settings


@dataclass(kw_only=True)
class GenerateOptions(ErasedModelOptions):
    """Draw images, with or without erasures."""

    prompt: tuple[str, ...]
    """What to draw; several prompts give several images."""
    seed: int = 0
    """Seed of the noise: image number i of a prompt has the noise of seed + i, whatever is attached."""
    steps: int | None = None
    """Denoising steps; the model's own number when left out."""
    guidance: float | None = None
    """Guidance scale; the model's own when left out."""
    count: int = 1
    """Images for each prompt."""
    compose: tuple[str, ...] = ()
    """Things that every prompt names ("cat dog") and that must all be drawn; the latents are guided by A-STAR."""
    compose_loss: Literal["a_star", "attend_and_excite"] = "a_star"
    """How they are guided."""
    out: Path
    """Folder of the images."""
    overwrite: bool = False
    """Write into a folder that is not empty."""
    json: bool = False
    """Print what was written as JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(GenerateOptions, "generate", argv)
    terminal.json_only = options.json
    if not options.prompt:
        raise UsageError("--prompt is empty: say what to draw")
    if options.count < 1 or (options.steps is not None and options.steps < 1):
        raise UsageError("--count and --steps are at least 1")
    check_strengths(options)
    check_seeds(options.seed, options.count)
    rank, world = process()
    out = output_folder(options.out, overwrite=options.overwrite, may_hold=rank > 0)
    erasures = load_erasures(options)
    pipe = open_model(options, task="composition" if options.compose else "text-to-image")
    manager = attach(pipe, erasures, options.strength)

    import torch

    from erasure.files import write_bytes
    from erasure.images import png
    from erasure.proof import LEAST_STRENGTH

    settings = call_settings(options.model, options.steps, options.guidance)
    if options.compose:
        settings |= {"subjects": list(options.compose), "loss": options.compose_loss}
    jobs = [(prompt, options.seed + index) for prompt in options.prompt for index in range(options.count)]
    written = []
    with terminal.progress(len(jobs[rank::world])) as progress:
        for index, (prompt, seed) in list(enumerate(jobs))[rank::world]:
            progress.stage(prompt)
            generator = torch.Generator("cpu").manual_seed(seed)
            image = pipe(prompt, generator=generator, **settings).images[0]
            path = out / f"{index:03d}-{slug(prompt)}-{seed}.png"
            write_bytes(path, png(image), error=UsageError)
            written.append({"file": str(path), "prompt": prompt, "seed": seed})
            progress.advance()
    if erasures:
        # Whoever asks for a weak erasure, or for none to compare with, gets it.
        manager.verify(least_strength=min([LEAST_STRENGTH, *manager.strengths.values()]))
    if options.json:
        terminal.result({"model": options.model, "erasures": list(options.erasure), **settings, "images": written})
    else:
        terminal.say(f"{len(jobs)} images in {out}")


def call_settings(model: str, steps: int | None = None, guidance: float | None = None) -> Settings:
    """Arguments of the pipeline's call: the user's, else those the model was made for, else the pipeline's own."""
    settings = dict(World.at(model).generation)
    if steps is not None:
        settings["num_inference_steps"] = steps
    if guidance is not None:
        settings["guidance_scale"] = guidance
    return settings


def slug(text: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "empty"
