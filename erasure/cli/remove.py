"""`erasure remove`: remove objects from images."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from erasure.cli.arguments import UsageError, parse
from erasure.cli.generate import call_settings
from erasure.cli.models import ErasedModelOptions, attach, check_seeds, check_strengths, load_erasures, open_model
from erasure.cli.records import Maker
from erasure.cli.terminal import Terminal

if TYPE_CHECKING:
    from erasure.interop.protocols import Settings
    from erasure.picture_record import PictureRecord

FORMAT_OF = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip
"""Pillow's name of the format of each ending."""
SAVING: dict[str, dict[str, object]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
"""How Pillow writes formats that lose something."""
HELD_BY = {"JPEG": ("L", "RGB"), "WEBP": ("RGB", "RGBA"), "BMP": ("L", "RGB")}
"""Modes that formats hold; others hold all that results have."""


class OutputError(UsageError):
    """A result cannot be written, which is no fault of its image."""


@dataclass(kw_only=True)
class RemoveOptions(ErasedModelOptions):
    """Remove from images what masks cover, or what words name, and fill the place with background."""

    image: Path
    """The image; or a folder of images, which may hold folders."""
    mask: Path | None = None
    """Mask with the image's proportions, white where something is to be removed. For a folder of images, a folder of
    masks of the same names (endings may differ), or one mask for all."""
    words: tuple[str, ...] = ()
    """What to remove when there is no mask, for instance "cat"; the model finds it. A word that it does not find is
    refused."""
    others: tuple[str, ...] = ()
    """Words for other things in the image, which stay; with them the model finds --words much more reliably."""
    out: Path
    """File of the result; with several, numbers are added to its name. For a folder of images, a folder, in which
    results have the names of their images; run again, the command goes on where it stopped."""
    png: bool = False
    """For a folder of images: write every result as PNG, which loses nothing and says what made it."""
    mask_out: Path | None = None
    """File for the mask that was used; for a folder of images, a folder."""
    overlay_out: Path | None = None
    """File for the image with the mask over it in red, also where what was found is refused; for a folder of images, a
    folder."""
    crop: bool = False
    """Fill only crops around the mask, at the size that the model draws, and paste them back. For images that are
    larger than that size."""
    crop_context: float | None = None
    """Surroundings that a crop shows on every side of what is removed, as a share of its extent; 0.5 when left out."""
    shadow: bool = False
    """Remove the shadow too: pixels next to the mask that have the background's colour, but darker."""
    prompt: str = ""
    """What to draw in place of the removed object; background when left out."""
    preset: str | None = None
    """Settings by name: `default`, `joint` for SD3 and Flux, or the paper's code's: `official-sd15`, `official-sd21`,
    `official-sdxl`. The family's own when left out."""
    steps: int | None = None
    """Denoising steps; the model's own number when left out."""
    noise_strength: float | None = None
    """Share of the steps that are run: how much noise the image begins with."""
    removal_guidance: float | None = None
    """Guidance scale of the prediction with redirected attention; 1 is that prediction without guidance."""
    blend_radius: float | None = None
    """Pixels over which the image's own pixels are blended in around the mask; 0 leaves those that the VAE decodes."""
    seed: int = 0
    """Seed of the noise, the same for every image of a folder."""
    count: int = 1
    """Number of results for each image."""
    omit_prompt: bool = False
    """Do not write the prompt and the words into PNG files, where `erasure info` shows them."""
    overwrite: bool = False
    """Replace existing files; for a folder of images, process all of them again."""
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
    if options.crop_context is not None and not options.crop:
        raise UsageError("--crop-context is for --crop: add that, or leave it out")
    check_strengths(options)
    check_seeds(options.seed, options.count)
    if os.path.isdir(options.image):
        from erasure.cli.remove_folder import remove_folder

        remove_folder(options, terminal)
        return
    if options.png or (options.mask is not None and os.path.isdir(options.mask)):
        raise UsageError(f"--png and a folder of masks go with a folder of images, and {options.image} is none")
    files = numbered(options.out, options.count)
    beside = [file for file in (options.mask_out, options.overlay_out) if file is not None]
    check_writable([*files, *beside], options.overwrite)
    from erasure.images import read_image

    image = read_image(options.image, error=UsageError)
    mask = None if options.mask is None else read_image(options.mask, error=UsageError)
    remover = Remover(options)
    with terminal.progress(1) as progress, progress.part():
        progress.stage("removing")
        scores = remover.remove(image, mask, files, options.mask_out, options.overlay_out)
    if options.json:
        written = [{"file": str(file), "seed": options.seed + index} for index, file in enumerate(files)]
        terminal.result({**remover.summary(), **({"words": scores} if scores else {}), "images": written})
    else:
        terminal.say(*map(str, files))


class Remover:
    """A model that takes things out of one image after the other, as the options of the command say."""

    def __init__(self, options: RemoveOptions) -> None:
        """Load the model and its erasures.

        Raises:
            ErasureError: One cannot be loaded, or a setting has no meaning.
        """
        self.options = options
        erasures = load_erasures(options)
        self.pipe = open_model(options, task="object-removal")
        self.maker = Maker("remove", options.model, self.pipe, omit_prompt=options.omit_prompt)
        if erasures:
            attach(self.pipe, erasures, options.strength)
        self.maker.attached(self.pipe)
        from erasure.interop.pipelines import check_steps
        from erasure.pipelines.removal_settings import chosen

        check_steps(self.pipe, options.steps)

        given = {
            "num_inference_steps": call_settings(options.model, options.steps).get("num_inference_steps"),
            "strength": options.noise_strength, "blend_radius": options.blend_radius,
            "removal_guidance_scale": options.removal_guidance, "crop_context": options.crop_context,
            "crop": options.crop or None,
        }  # fmt: skip
        self.settings: Settings = {name: value for name, value in given.items() if value is not None}
        self.preset: str = options.preset or self.pipe.own_preset
        # What has no meaning is refused now, and not once for each image.
        chosen(self.preset, dict(self.settings))

    def summary(self) -> Settings:
        """What all results have in common, for the summary."""
        return {"model": self.options.model, **self.recorded_settings()}

    def recorded_settings(self) -> Settings:
        """Settings that a picture's record keeps."""
        return {"preset": self.preset, **self.settings, **({"shadow": True} if self.options.shadow else {})}

    def remove(
        self, image: Image.Image, mask: Image.Image | None, files: Sequence[Path], mask_out: Path | None,
        overlay_out: Path | None,
    ) -> dict[str, float]:  # fmt: skip
        """Take out of an image what a mask covers, or what the words name, and write the results.

        Args:
            image: As it was read, in the mode of its file, which results have too.
            mask: As it was read: a brush on a transparent ground is told from its transparency.
            files: One for each result.
            mask_out: File for the mask that was used.
            overlay_out: File for the image with the mask over it.

        Returns:
            How surely each word is in the image; empty with a mask.

        Raises:
            ErasureError: A word is not found, or the mask does not fit.
        """
        import torch

        from erasure.images import in_mode_of, rgb
        from erasure.masks import laid_over, read_masks
        from erasure.pipelines.pictures import read_pixels
        from erasure.pipelines.shadows import with_shadows

        options = self.options
        seen, scores = rgb(image, "an image", error=UsageError), {}
        given: object = mask
        if mask is None:
            looked = seen
            if options.crop:
                height, width = self.pipe.drawn_size(seen.height, seen.width)
                looked = seen.resize((width, height), Image.Resampling.BICUBIC)
            found = self.pipe.localize(looked, options.words, others=options.others)
            scores = dict(zip(options.words, map(float, found.presence[0]), strict=True))
            if overlay_out is not None:
                save(laid_over(looked, found.masks[0, : len(options.words)].any(0)), overlay_out)
            given = found.of_words()[0]
        (used,) = read_masks(given, (seen.height, seen.width), 1)
        if options.shadow:
            (used,) = with_shadows(used[None], read_pixels(seen))
        if overlay_out is not None:
            save(laid_over(seen, used), overlay_out)
        seeds = [options.seed + index for index in range(options.count)]
        results = self.pipe(
            seen, used, prompt=options.prompt, preset=self.preset, num_images_per_prompt=options.count,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds], **self.settings,
        ).images  # fmt: skip
        named = {"words": list(options.words), "others": list(options.others)}
        names = {} if options.omit_prompt else {name: words for name, words in named.items() if words}
        for file, seed, result in zip(files, seeds, results, strict=True):
            record = self.maker.record(seed, {**self.recorded_settings(), **names}, options.prompt)
            save(in_mode_of(image, result), file, record)
        if mask_out is not None:
            save(Image.fromarray(used.numpy()).convert("L"), mask_out)
        return scores


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


def save(image: Image.Image, file: Path, record: PictureRecord | None = None) -> None:
    """Write a picture in the format of the file's ending, whole or not at all, with its colour profile.

    What the format cannot hold is left out: opacity (on white), and 16 bits.

    Args:
        image: The picture.
        file: Where to.
        record: What made it, for PNG files.

    Raises:
        OutputError: It cannot be written.
    """
    from erasure.files import write_bytes
    from erasure.images import rgb
    from erasure.picture_record import png_info

    kind = FORMAT_OF[file.suffix.lower()]
    more = dict(SAVING.get(kind, {}))
    if record is not None and kind == "PNG":
        more["pnginfo"] = png_info(record)
    if profile := image.info.get("icc_profile"):
        more["icc_profile"] = profile
    if image.mode not in HELD_BY.get(kind, (image.mode,)):
        has_opacity = image.mode == "LA" and "RGBA" in HELD_BY[kind]
        image = image.convert("RGBA") if has_opacity else rgb(image, str(file), error=UsageError)
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    write_bytes(file, buffer.getvalue(), error=OutputError)
