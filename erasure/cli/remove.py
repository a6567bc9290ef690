"""`erasure remove`: take objects out of images."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from erasure.cli.generate import call_settings
from erasure.cli.models import ErasedModelOptions, attach, check_seeds, check_strengths, load_erasures, open_model
from erasure.cli.terminal import Terminal, UsageError, parse

FORMAT_OF = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip
"""Pillow's name of the format of each ending."""


@dataclass(kw_only=True)
class RemoveOptions(ErasedModelOptions):
    """Take out of an image what a mask covers, or what words name, and fill its place with background."""

    image: Path
    """The image."""
    mask: Path | None = None
    """White where something is to be removed; of the image's proportions."""
    words: tuple[str, ...] = ()
    """Without a mask: what to remove ("cat"), found by the model itself. A word that it does not find is refused."""
    others: tuple[str, ...] = ()
    """What else is in the image and stays; makes finding by words much surer."""
    out: Path
    """File of the result; with several, numbers are added to its name."""
    mask_out: Path | None = None
    """File for the mask that was used."""
    overlay_out: Path | None = None
    """File for the image with the mask over it in red, also where what was found is refused."""
    prompt: str = ""
    """What should be in its place; background when left out."""
    preset: str | None = None
    """Settings by name: `default`, `joint` for SD3 and Flux, or the paper's code's: `official-sd15`, `official-sd21`,
    `official-sdxl`. The family's own when left out."""
    steps: int | None = None
    """Denoising steps; the model's own number when left out."""
    noise_strength: float | None = None
    """Share of the steps that are run: how much noise the image begins with."""
    removal_guidance: float | None = None
    """How far the prediction is steered towards redirected attention; 1 takes it as it is."""
    blend_radius: float | None = None
    """Pixels over which the image's own pixels are blended in around the mask; 0 leaves those that the VAE decodes."""
    seed: int = 0
    """Of the noise."""
    count: int = 1
    """Results."""
    overwrite: bool = False
    """Replace files that are there."""
    json: bool = False
    """Print what was written as JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(RemoveOptions, "remove", argv)
    terminal.json_only = options.json
    if (options.mask is None) == (not options.words):
        raise UsageError("say what to remove: --mask with a file, or --words, and not both")
    if options.count < 1 or (options.steps is not None and options.steps < 1):
        raise UsageError("--count and --steps are at least 1")
    check_strengths(options)
    check_seeds(options.seed, options.count)
    files = numbered(options.out, options.count)
    beside = [file for file in (options.mask_out, options.overlay_out) if file is not None]
    check_writable([*files, *beside], options.overwrite)
    from erasure.images import read_image, read_rgb

    image = read_rgb(options.image, error=UsageError)
    # As it is: a brush on a transparent ground is told from its transparency.
    mask = None if options.mask is None else read_image(options.mask, error=UsageError)
    erasures = load_erasures(options)
    pipe = open_model(options, task="object-removal")
    if erasures:
        attach(pipe, erasures, options.strength)

    import torch

    from erasure.masks import laid_over, read_masks

    given = {
        "num_inference_steps": call_settings(options.model, options.steps).get("num_inference_steps"),
        "strength": options.noise_strength, "blend_radius": options.blend_radius,
        "removal_guidance_scale": options.removal_guidance,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    preset = options.preset or pipe.own_preset
    with terminal.progress(1) as progress, progress.part():
        progress.stage("removing")
        scores = {}
        if mask is None:
            found = pipe.localize(image, options.words, others=options.others)
            scores = dict(zip(options.words, map(float, found.presence[0]), strict=True))
            if options.overlay_out is not None:
                save(laid_over(image, found.masks[0, : len(options.words)].any(0)), options.overlay_out)
            mask = found.of_words()[0]
        (used,) = read_masks(mask, (image.height, image.width), 1)
        if options.overlay_out is not None:
            save(laid_over(image, used), options.overlay_out)
        results = pipe(
            image, used, prompt=options.prompt, preset=preset, num_images_per_prompt=options.count,
            generator=[torch.Generator("cpu").manual_seed(options.seed + index) for index in range(options.count)],
            **settings,
        ).images  # fmt: skip
    for file, result in zip(files, results, strict=True):
        save(result, file)
    if options.mask_out is not None:
        save(Image.fromarray(used.numpy()).convert("L"), options.mask_out)
    if options.json:
        written = [{"file": str(file), "seed": options.seed + index} for index, file in enumerate(files)]
        found_words = {"words": scores} if scores else {}
        terminal.result({"model": options.model, "preset": preset, **settings, **found_words, "images": written})
    else:
        terminal.say(*map(str, files))


def numbered(file: Path, count: int) -> list[Path]:
    """`clean.png`, or `clean-0.png`, `clean-1.png` and so on."""
    if count == 1:
        return [file]
    return [file.with_name(f"{file.stem}-{index}{file.suffix}") for index in range(count)]


def check_writable(files: Sequence[Path], overwrite: bool) -> None:
    """Make sure before any work is done that pictures can be written to files.

    Raises:
        UsageError: One has no ending of a picture, is there, is named twice, or its folder is not there.
    """
    for file in files:
        if file.suffix.lower() not in FORMAT_OF:
            raise UsageError(
                f"{file} has no ending of an image: name it, for instance, clean.png; allowed: {', '.join(FORMAT_OF)}"
            )
        if files.count(file) > 1:
            raise UsageError(f"{file} is named twice: name a file for the result, and another for the mask")
        if os.path.isdir(file) or (os.path.lexists(file) and not overwrite):
            raise UsageError(f"{file} is there: name another file, or add --overwrite")
        if not os.path.isdir(file.parent):
            raise UsageError(f"{file.parent} is no folder: make it first")


def save(image: Image.Image, file: Path) -> None:
    """Write a picture in the format of the file's ending, whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    from erasure.files import write_bytes

    buffer = io.BytesIO()
    image.save(buffer, FORMAT_OF[file.suffix.lower()])
    write_bytes(file, buffer.getvalue(), error=UsageError)
