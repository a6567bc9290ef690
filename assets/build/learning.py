"""Learn new things from pictures of two, draw them, erase them: how well each step works on `canvas-sd`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import BaseModel, ConfigDict

import erasure
from erasure.assets import novel
from erasure.assets.build.measured import DIGITS, Figure, Row, figure
from erasure.assets.scenes import RenderedScene, Scene, render
from erasure.assets.world import BACKGROUNDS, OBJECTS
from erasure.backbones import backbone_for
from erasure.errors import EvaluationError
from erasure.eval.detectors import NewcomersAnswer, NewcomersJudge
from erasure.eval.statistics import wilson
from erasure.files import read_json, write_json
from erasure.interop.protocols import Settings
from erasure.learning import LearnedConcepts, learn_concepts
from erasure.learning.attencraft import AttenCraft
from erasure.learning.pictures import encoded
from erasure.learning.tokens import beside, put_in, start_vectors
from erasure.training.run import Run

TOKENS = ("<one>", "<two>")
PROMPTS = ("a photo of {}", "{}", "a picture of {}", "{} on a blue background", "an image of {}")
"""The last two are in phrasings that nothing was learned in."""
GUIDANCE, STEPS = 3.0, 25
ALL = "all"
"""Name of the row of all things."""


class Pair(NamedTuple):
    """A picture of two new things."""

    things: tuple[str, str]
    scene: RenderedScene


class ThingFigures(BaseModel):
    """Figures of one new thing; every share is one of the images that were drawn of it."""

    model_config = ConfigDict(extra="forbid")
    thing: str
    mask: float
    """Intersection over union with the truth of the mask that learning starts from."""
    drawn: float
    """Share of images of its token that show it, and not the other thing of its picture."""
    erased: float
    """Share of images of its token that do not show it once it is erased."""
    kept: float
    """Share of images that show it, as `drawn`, once the other thing of its picture is erased."""


class PairFigures(BaseModel):
    """Figures of one picture of two new things."""

    model_config = ConfigDict(extra="forbid")
    things: tuple[ThingFigures, ThingFigures]
    both: float
    """Share of images of a prompt with both tokens that show both things."""
    known: float
    """Share of the objects that the model knew before which it still draws."""
    seconds: float
    """Duration of the learning."""
    size_bytes: int
    """Size of the folder of learned concepts."""


def pairs(count: int, seed: int = 5) -> list[Pair]:
    """Pictures of neighbours in the list of new things, on the backgrounds of Canvas in turn."""
    rng, names = np.random.default_rng(seed), list(novel.THINGS)
    made = []
    for number in range(count):
        things = names[2 * number % len(names)], names[(2 * number + 1 + 2 * number // len(names)) % len(names)]
        offsets = tuple((0, int(rng.integers(-3, 4))) for _ in things)
        scene = Scene(things, novel.PLAIN, BACKGROUNDS[number % len(BACKGROUNDS)], offsets)
        made.append(Pair(things, render(scene)))
    return made


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((first & second).sum() / max(1, (first | second).sum()))


def masks_of(pipe: DiffusionPipeline, pair: Pair, method: AttenCraft, seed: int = 0) -> list[float]:
    """Intersection over union with the truth of the masks that learning starts from."""
    backbone = backbone_for(beside(pipe))
    generator = torch.Generator().manual_seed(seed)
    vectors = {name: start_vectors(backbone.reader, "", method.vectors, method.spread, generator) for name in TOKENS}
    put_in(backbone.pipe, {backbone.reader.component: vectors})
    pixels = torch.from_numpy(pair.scene.image).permute(2, 0, 1)[None].float() / 255
    found = method.first(backbone, encoded(backbone, pixels), TOKENS, {}, seed)[0].numpy()
    return [overlap(own, true) for own, true in zip(found, pair.scene.masks, strict=True)]


def drawn(pipe: DiffusionPipeline, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """An image of each prompt, from noise of its own."""
    images: list[Image.Image] = []
    for first in range(0, len(prompts), 10):
        part = prompts[first : first + 10]
        noise = [torch.Generator().manual_seed(seed + first + row) for row in range(len(part))]
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": noise}
        images += pipe(list(part), **settings).images
    return images


def is_apart(found: NewcomersAnswer, wanted: str, other: str) -> bool:
    """Whether what is seen is the one thing more than anything else, and the other not at all."""
    return found.thing == wanted and other not in found.things


def measure(folder: Path, pair: Pair, images: int, erasing: str, options: Settings) -> PairFigures:
    """One pair: masks, how often each token draws its thing, and how often it still does when it is erased."""
    pipe, judge = erasure.load_pipeline("canvas-sd", device="cpu"), NewcomersJudge()
    pipe.set_progress_bar_config(disable=True)
    masks = masks_of(pipe, pair, AttenCraft(**options))
    if folder.is_dir():
        concepts = LearnedConcepts.read(folder)
    else:
        picture, run = Image.fromarray(pair.scene.image), Run(checkpoints=folder.with_suffix(".training"))
        concepts = learn_concepts(pipe, picture, TOKENS, load=False, progress=False, run=run, **options)
        concepts.save(folder)
        run.discard()
    concepts.load_into(pipe)
    prompts = [[PROMPTS[i % len(PROMPTS)].format(token) for i in range(images)] for token in TOKENS]

    def shown(number: int) -> float:
        """Share of the images of a token that show its thing, and not the other one."""
        wanted, other = pair.things[number], pair.things[1 - number]
        return float(np.mean([is_apart(found, wanted, other) for found in judge(drawn(pipe, prompts[number]))]))

    apart = [shown(number) for number in range(len(TOKENS))]
    both = judge(drawn(pipe, [f"a photo of {TOKENS[0]} and {TOKENS[1]}"] * images))
    known = hits(judge, drawn(pipe, [f"a photo of a {name}" for name in OBJECTS]))
    gone, kept = [], []
    for number, thing in enumerate(pair.things):
        erasure.erase(pipe, erasure.Concept(TOKENS[number], retain=(TOKENS[1 - number],)), erasing, progress=False)
        gone.append(float(np.mean([thing not in found.things for found in judge(drawn(pipe, prompts[number]))])))
        kept.append(shown(1 - number))
        pipe.unload_erasures()
    first, second = (
        ThingFigures(thing=thing, mask=masks[i], drawn=apart[i], erased=gone[i], kept=kept[1 - i])
        for i, thing in enumerate(pair.things)
    )
    return PairFigures(
        things=(first, second),
        both=float(np.mean([set(pair.things) <= set(found.things) for found in both])),
        known=known,
        seconds=concepts.config.cost["seconds"],
        size_bytes=concepts.size_bytes,
    )


def hits(judge: NewcomersJudge, images: Sequence[Image.Image]) -> float:
    """Share of images, one of each known object in order, that show it more than anything else."""
    return float(np.mean([found.thing == name for found, name in zip(judge(images), OBJECTS, strict=True)]))


def measured(out: Path, count: int, images: int, erasing: str, options: Settings | None = None) -> list[PairFigures]:
    """Measure pairs, and write `learning.json` after each; what is measured already stays."""
    file = out / "learning.json"
    found: list[PairFigures] = []
    if file.is_file():
        found = read_json(file, list[PairFigures], error=EvaluationError)
    for number, pair in enumerate(pairs(count)):
        if number >= len(found):
            found.append(measure(out / "-".join(pair.things), pair, images, erasing, options or {}))
            write_json(file, [each.model_dump() for each in found])
    return found[:count]


def rows(found: Sequence[PairFigures], images: int) -> list[Row]:
    """Make a row for each thing, and one for all of them.

    Args:
        found: Figures of every pair.
        images: How many images of each thing there are.
    """

    def share(rate: float, of: int = images) -> Figure:
        return figure(wilson(rate * of, of), of)

    made: list[Row] = []
    for pair in found:
        own: Row = {"both": share(pair.both), "known": share(pair.known, len(OBJECTS)),
                    "seconds": round(pair.seconds, DIGITS), "kB": round(pair.size_bytes / 1000, DIGITS)}  # fmt: skip
        for each in pair.things:
            row: Row = {
                "thing": each.thing, "mask": round(each.mask, DIGITS), "drawn": share(each.drawn),
                "erased": share(each.erased), "kept": share(each.kept),
            }  # fmt: skip
            made.append(row | (own if each is pair.things[0] else {}))
    return [*made, _all(made)]


def _all(made: Sequence[Row]) -> Row:
    """The row of all things: means, and the rates of all images together."""
    every: Row = {"thing": ALL}
    for name in dict.fromkeys(name for row in made for name in row if name != "thing"):
        cells: list[Any] = [row[name] for row in made if name in row]
        if isinstance(cells[0], dict):
            images = sum(cell["n"] for cell in cells)
            every[name] = figure(wilson(sum(cell["value"] * cell["n"] for cell in cells), images), images)
        else:
            every[name] = round(float(np.mean(cells)), DIGITS)
    return every
