"""`erasure remove`: take objects out of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from erasure.cli.generate import call_settings
from erasure.cli.models import ErasedModelOptions, attach, check_strengths, load_erasures, open_model
from erasure.cli.terminal import Terminal, UsageError, parse


@dataclass(kw_only=True)
class RemoveOptions(ErasedModelOptions):
    """Take out of an image what a mask covers, or what words name, and fill its place with background."""

    image: Path
    """The image."""
    mask: Path | None = None
    """White where something is to be removed; of the image's proportions."""
    words: tuple[str, ...] = ()
    """Without a mask: what to remove ("cat"), found through the model's attention."""
    others: tuple[str, ...] = ()
    """What else is in the image and stays; makes finding by words surer."""
    out: Path
    """File of the result; with several, numbers are added to its name."""
    mask_out: Path | None = None
    """File for the mask that was used."""
    prompt: str = ""
    """What should be in its place; background when left out."""
    preset: str = "default"
    """Settings by name: `default`, or the paper's code's: `official-sd15`, `official-sd21`, `official-sdxl`."""
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
    files = numbered(options.out, options.count)
    for file in (*files, *((options.mask_out,) if options.mask_out else ())):
        check_writable(file, options.overwrite)
    image = read(options.image)
    mask = None if options.mask is None else read(options.mask)
    erasures = load_erasures(options)
    pipe: Any = open_model(options, task="object-removal")
    if erasures:
        attach(pipe, erasures, options.strength)

    import torch

    given = {
        "num_inference_steps": call_settings(options.model, options.steps).get("num_inference_steps"),
        "strength": options.noise_strength, "blend_radius": options.blend_radius,
        "removal_guidance_scale": options.removal_guidance,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    with terminal.progress(1) as progress, progress.part():
        progress.stage("removing")
        if mask is None:
            found = pipe.localize(image, options.words, others=options.others).masks[0, : len(options.words)].any(0)
            if not found.any():
                raise UsageError(
                    f"nothing in {options.image} draws attention to {' or '.join(options.words)}: use --mask"
                )
            mask = Image.fromarray(found.numpy())
        results = pipe(
            image, mask, prompt=options.prompt, preset=options.preset, num_images_per_prompt=options.count,
            generator=[torch.Generator("cpu").manual_seed(options.seed + index) for index in range(options.count)],
            **settings,
        ).images  # fmt: skip
    for file, result in zip(files, results, strict=True):
        result.save(file)
    if options.mask_out is not None:
        mask.convert("L").save(options.mask_out)
    if options.json:
        written = [{"file": str(file), "seed": options.seed + index} for index, file in enumerate(files)]
        terminal.result({"model": options.model, "preset": options.preset, **settings, "images": written})
    else:
        terminal.say(*map(str, files))


def numbered(file: Path, count: int) -> list[Path]:
    """`clean.png`, or `clean-0.png`, `clean-1.png` and so on.

    Raises:
        UsageError: No ending that says which kind of image it is.
    """
    if file.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"--out {file} has no ending of an image: name it, for instance, clean.png")
    if count == 1:
        return [file]
    return [file.with_name(f"{file.stem}-{index}{file.suffix}") for index in range(count)]


def check_writable(file: Path, overwrite: bool) -> None:
    """Make sure before any work is done that a file can be written.

    Raises:
        UsageError: It is there, or its folder is not.
    """
    if file.exists() and not overwrite:
        raise UsageError(f"{file} is there: name another file, or add --overwrite")
    if not file.parent.is_dir():
        raise UsageError(f"{file.parent} is no folder: make it first")


def read(file: Path) -> Image.Image:
    """Read an image file.

    Raises:
        UsageError: It is missing or damaged.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UsageError(f"cannot read the image {file}: {error.strerror or error}") from error
