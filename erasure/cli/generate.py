"""`erasure generate`: draw images, with or without erasures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erasure.cli.arguments import UsageError, parse
from erasure.cli.lists import LONGEST_PROMPT, MOST_GUIDANCE, PromptRow, is_list_file, read_prompts
from erasure.cli.models import (
    ErasedModelOptions,
    attach,
    check_seeds,
    check_strengths,
    load_erasures,
    open_model,
    require_tokens,
)
from erasure.cli.output import check_output_folder
from erasure.cli.processes import process
from erasure.cli.records import Maker
from erasure.cli.terminal import Terminal
from erasure.files import shown
from erasure.world import World

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from erasure.interop.protocols import Settings


@dataclass(kw_only=True)
class GenerateOptions(ErasedModelOptions):
    """Draw images, with or without erasures."""

    prompt: tuple[str, ...]
    """What to draw: texts, and files of them. A CSV file has a column `prompt`, and may have `negative_prompt`,
    `seed`, `guidance`, `steps`, `height` and `width` (or the names that UCE's, ESD's and I2P's files have for them); a
    text file has one prompt on each line; JSON (lines) are texts or objects with those keys."""
    negative_prompt: str | None = None
    """What the images must not show; that of a file's row when left out."""
    seed: int | None = None
    """Seed of the noise: image number i of a prompt has the noise of seed + i, whatever is attached and however many
    are drawn at once. Left out, a file's row says it, and else it is 0."""
    steps: int | None = None
    """Denoising steps; those of a file's row, or else the model's own number when left out."""
    guidance: float | None = None
    """Guidance scale; that of a file's row, or else the model's own when left out."""
    batch_size: int = 4
    """Images that are drawn at once: fewer take less memory."""
    count: int = 1
    """Images for each prompt."""
    compose: tuple[str, ...] = ()
    """Things that every prompt names ("cat dog") and that must all be drawn; the latents are guided by A-STAR."""
    compose_loss: Literal["a_star", "attend_and_excite"] = "a_star"
    """How they are guided."""
    out: Path
    """Folder of the images."""
    omit_prompt: bool = False
    """Leave prompts out of what is written into the pictures (see `erasure info`). File names are made from prompts
    all the same."""
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
    if options.count < 1 or options.batch_size < 1 or (options.steps is not None and options.steps < 1):
        raise UsageError("--count, --batch-size and --steps are at least 1")
    if options.guidance is not None and not 0 <= options.guidance <= MOST_GUIDANCE:
        raise UsageError(f"--guidance {options.guidance} is no scale: give a number from 0 to {MOST_GUIDANCE}")
    check_strengths(options)
    rows = prompt_rows(options)
    for row in rows:
        check_seeds(row.seed or 0, options.count)
    if any(row.negative_prompt and guidance_of(row, options) <= 1 for row in rows):
        terminal.complain("warning", "negative prompts count for nothing where the guidance scale is 1 or less")
    rank, world = process()
    out = check_output_folder(options.out, overwrite=options.overwrite)
    erasures = load_erasures(options)
    pipe = open_model(options, task="composition" if options.compose else "text-to-image")
    require_tokens(pipe, [text for row in rows for text in (row.prompt, row.negative_prompt or "")])
    check_settings(pipe, rows)
    maker = Maker("generate", options.model, pipe, omit_prompt=options.omit_prompt)
    manager = attach(pipe, erasures, options.strength)
    maker.attached(pipe)

    from erasure.files import slug, write_bytes
    from erasure.images import png
    from erasure.proof import LEAST_STRENGTH

    images = [replace(row, seed=(row.seed or 0) + index) for row in rows for index in range(options.count)]
    mine = list(enumerate(images))[rank::world]
    written = []
    with terminal.progress(len(mine)) as progress:
        for batch in batches(mine, options.batch_size):
            progress.stage(batch[0][1].prompt)
            drawn = draw(pipe, [row for _, row in batch], options)
            for (index, row), image in zip(batch, drawn, strict=True):
                path = out / f"{index:03d}-{slug(row.prompt, 48) or 'empty'}-{row.seed}.png"
                record = maker.record(row.seed or 0, settings_of(row, options), row.prompt, row.negative_prompt)
                write_bytes(path, png(image, record), error=UsageError)
                said = {name: value for name, value in asdict(row).items() if value is not None}
                written.append({"file": str(path), **said})
                progress.advance()
    if erasures:
        # Whoever asks for a weak erasure, or for none to compare with, gets it.
        manager.verify(least_strength=min([LEAST_STRENGTH, *manager.strengths.values()]))
    if options.json:
        settings = call_settings(options.model, options.steps, options.guidance) | composition(options)
        terminal.result({"model": options.model, "erasures": list(options.erasure), **settings, "images": written})
    else:
        terminal.say(f"{len(images)} images in {out}")


def prompt_rows(options: GenerateOptions) -> list[PromptRow]:
    """Every prompt, those of files among them, with what the options say of all of them.

    Raises:
        UsageError: A file that is missing or cannot be read.
    """
    found: list[PromptRow] = []
    for text in (*options.prompt, options.negative_prompt or ""):
        if len(text) > LONGEST_PROMPT:
            raise UsageError(
                f"a prompt has {len(text):,} characters ({shown(text)}), at most {LONGEST_PROMPT:,} are allowed: text "
                "encoders leave out all but its beginning; a file of prompts is given by its name"
            )
    for text in options.prompt:
        found += read_prompts(text) if is_list_file(text) else [PromptRow(text)]
    own = {name: getattr(options, name) for name in ("negative_prompt", "seed", "steps", "guidance")}
    return [replace(row, **{name: value for name, value in own.items() if value is not None}) for row in found]


def check_settings(pipe: DiffusionPipeline, rows: Sequence[PromptRow]) -> None:
    """Refuse numbers of steps and sizes that the model cannot draw, before anything is drawn.

    Raises:
        ErasureError: There is one.
    """
    from erasure.backbones import backbone_for
    from erasure.interop.pipelines import check_steps

    latents = backbone_for(pipe).latents
    for steps, height, width in {(row.steps, row.height, row.width) for row in rows}:
        check_steps(pipe, steps)
        latents.shape(height, width)


def batches(images: Sequence[tuple[int, PromptRow]], size: int) -> Iterator[list[tuple[int, PromptRow]]]:
    """Images in their order, those together that one call can draw."""
    settings = attrgetter("steps", "guidance", "height", "width")
    for _, alike in groupby(images, lambda image: settings(image[1])):
        rest = list(alike)
        while rest:
            yield rest[:size]
            rest = rest[size:]


def draw(pipe: DiffusionPipeline, rows: Sequence[PromptRow], options: GenerateOptions) -> list[Image.Image]:
    """The images of some rows, each from the noise of its seed; fewer at once where memory does not suffice."""
    import torch

    from erasure.backbones import backbone_for

    first, backbone = rows[0], backbone_for(pipe)
    own = call_settings(options.model, first.steps, first.guidance)
    settings = backbone.call_options(
        own.get("guidance_scale"), own.get("num_inference_steps"),
        (first.height or own.get("height"), first.width or own.get("width")),
        [row.negative_prompt or "" for row in rows],
    ) | composition(options)  # fmt: skip
    generators = [torch.Generator("cpu").manual_seed(row.seed or 0) for row in rows]
    try:
        images: list[Image.Image] = pipe([row.prompt for row in rows], generator=generators, **settings).images
        return images
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    half = len(rows) // 2
    return [*draw(pipe, rows[:half], options), *draw(pipe, rows[half:], options)]


def settings_of(row: PromptRow, options: GenerateOptions) -> Settings:
    """How a row is drawn, as far as somebody said it: arguments that a picture's record keeps."""
    sides = {"height": row.height, "width": row.width}
    said = {name: side for name, side in sides.items() if side is not None}
    learned = {"learned": [Path(folder).name for folder in options.learned]} if options.learned else {}
    return call_settings(options.model, row.steps, row.guidance) | said | composition(options) | learned


def composition(options: GenerateOptions) -> Settings:
    """Arguments that make a call draw all that every prompt names."""
    return {"subjects": list(options.compose), "loss": options.compose_loss} if options.compose else {}


def guidance_of(row: PromptRow, options: GenerateOptions) -> float:
    """Guidance scale that a row is drawn with; that of most pipelines where nobody says it."""
    return float(call_settings(options.model, row.steps, row.guidance).get("guidance_scale", 7.5))


def call_settings(model: str, steps: int | None = None, guidance: float | None = None) -> Settings:
    """How the model draws: as the user says, else as it was made for; what is left out is the pipeline's own."""
    return World.at(model).call_settings(steps, guidance)
