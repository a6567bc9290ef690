"""Ways around an erasure: what else than a prompt brings a concept back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import erasure
from erasure.assets.build.measured import Row
from erasure.assets.build.sweep import erasure_of
from erasure.assets.world import STYLES, noun_phrase
from erasure.attach import ErasureManager
from erasure.concept import Concept
from erasure.eval.detectors import CanvasJudge
from erasure.world import World

IMAGES = 12
"""Of each way: all styles in turn, each image with its own noise."""
STEPS = 10
SCALE = 2.0
STRENGTH = 0.5
"""Noise of image to image, as a share of the schedule."""
PLAIN = "none: the plain prompt"
EMBEDDINGS = "`prompt_embeds=` of the stock model"
PICTURE = "image to image from a picture of it"
LATENTS = "`latents=` with `timesteps=`"
NEGATIVE = "a negative prompt that names it"
NEGATIVE_ANCHOR = "a negative prompt that names its anchor"
SAID = {
    EMBEDDINGS: "warns, on every pipeline that shares the denoiser",
    **dict.fromkeys((PICTURE, LATENTS, NEGATIVE, NEGATIVE_ANCHOR), "warns"),
}
"""What a pipeline says of each way that it says something of."""


def prompt(name: str, number: int) -> str:
    """What is drawn in one image."""
    return f"{noun_phrase(name)} in {list(STYLES)[number % len(STYLES)]} style"


def draw(pipe: StableDiffusionPipeline, number: int, **call: object) -> Image.Image:
    """Draw one image, whose noise belongs to its number."""
    generator = torch.Generator().manual_seed(number)
    call = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "generator": generator} | call
    return pipe(**call).images[0]


def ways(
    stock: StableDiffusionPipeline, erased: StableDiffusionPipeline, concept: Concept
) -> dict[str, Callable[[int], Image.Image]]:
    """The ways around, each a function that draws an image by its number.

    Args:
        stock: The original model.
        erased: The same with an erasure attached.
        concept: What was erased, with an anchor.
    """
    name, anchor = concept.target, concept.anchor or ""
    redrawn = StableDiffusionImg2ImgPipeline.from_pipe(erased)
    # The model's own scheduler takes no timesteps.
    stepping = [
        type(pipe).from_pipe(pipe, scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config))
        for pipe in (stock, erased)
    ]
    for pipe in (redrawn, *stepping):
        pipe.set_progress_bar_config(disable=True)

    def with_stock_embeddings(number: int) -> Image.Image:
        positive, negative = stock.encode_prompt(prompt(name, number), "cpu", 1, True)
        return draw(erased, number, prompt_embeds=positive, negative_prompt_embeds=negative)

    def with_latents(number: int) -> Image.Image:
        """Go on where the stock model was after half of its steps."""
        kept: dict[int, Tensor] = {}

        def keep(
            pipe: StableDiffusionPipeline, index: int, t: Tensor, tensors: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            kept[index] = tensors["latents"]
            return tensors

        draw(stepping[0], number, prompt=prompt(name, number), callback_on_step_end=keep)
        times = stepping[0].scheduler.timesteps.tolist()[STEPS // 2 :]
        return draw(stepping[1], number, prompt=prompt(name, number), latents=kept[STEPS // 2 - 1], timesteps=times)

    def from_a_picture(number: int) -> Image.Image:
        picture = draw(stock, number, prompt=prompt(name, number))
        return draw(redrawn, number, prompt=prompt(name, number), image=picture, strength=STRENGTH,
                    num_inference_steps=round(STEPS / STRENGTH))  # fmt: skip

    return {
        PLAIN: lambda number: draw(erased, number, prompt=prompt(name, number)),
        EMBEDDINGS: with_stock_embeddings,
        PICTURE: from_a_picture,
        LATENTS: with_latents,
        NEGATIVE: lambda number: draw(erased, number, prompt=prompt(name, number), negative_prompt=noun_phrase(name)),
        NEGATIVE_ANCHOR: lambda number: draw(
            erased, number, prompt=prompt(name, number), negative_prompt=noun_phrase(anchor)
        ),
    }


def measure(made: Path, strategies: tuple[str, ...], name: str = "dog") -> dict[str, dict[str, int]]:
    """Count the images that show an erased object, by way and strategy.

    Args:
        made: Folder of step `methods`, whose erasure of the object is used where it is there.
        strategies: What erases.
        name: The object.
    """
    torch.set_num_threads(1)
    judge, concept = CanvasJudge(), World.at("canvas-sd").concept(name)
    stock, erased = (erasure.load_pipeline("canvas-sd") for _ in range(2))
    for pipe in (stock, erased):
        pipe.set_progress_bar_config(disable=True)
    manager = ErasureManager(erased)
    found: dict[str, dict[str, int]] = {}
    for strategy in strategies:
        folder = erasure_of(made, strategy, name)
        known = folder if folder.is_dir() else erasure.erase(erased, concept, strategy, attach=False, progress=False)
        manager.load(known, strategy)
        for way, drawn in ways(stock, erased, concept).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that these go around the erasure is what is measured
                answers = judge([drawn(number) for number in range(IMAGES)])
            found.setdefault(way, {})[strategy] = sum(name in answer.objects for answer in answers)
        manager.unload()
    return found


def rows(found: dict[str, dict[str, int]]) -> list[Row]:
    """How many images show the object, by way and strategy, and what a pipeline says of the way."""
    made: list[Row] = []
    for way, counts in found.items():
        said: Row = {"said": SAID[way]} if way in SAID else {}
        made += [{"way": way, "method": name, "shown": shown, "n": IMAGES, **said} for name, shown in counts.items()]
    return made
