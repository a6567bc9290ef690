"""Measure what the words of a prompt draw: their share of cross-attention, and how well it lies on what they name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from erasure.assets import path
from erasure.assets.build.evaluate import sheet
from erasure.assets.build.export import GENERATION
from erasure.assets.build.grounding import object_masks, object_tokens, without_end
from erasure.assets.build.measured import Row
from erasure.assets.facts import FILE
from erasure.assets.scenes import Scene, render
from erasure.assets.world import BACKGROUNDS, OBJECTS, STYLES, noun_phrase
from erasure.backbones import attention_sites
from erasure.carriers.attention import AttentionController, Layout
from erasure.eval.detectors import CanvasJudge
from erasure.sae.gates import area

SHIPPED = "shipped: both, two objects in either order"
"""What the shipped model is called in the table of how it was trained."""


class Maps(NamedTuple):
    """Attention to the words of scenes with one object each."""

    scenes: list[Scene]
    pixels: Tensor
    """`(scenes, 3, 64, 64)` in [-1, 1]."""
    share: Tensor
    """`(scenes,)`: what the object's word draws, mean over layers, image tokens and noise levels."""
    grids: dict[int, Tensor]
    """By side of the grid, `(scenes, side, side)`: mean over the layers of that grid, and over noise levels."""


def plan(seed: int = 0) -> list[Scene]:
    """Every object in every style, on backgrounds in turn."""
    rng = np.random.default_rng(seed)
    return [
        Scene((name,), style, BACKGROUNDS[rng.integers(len(BACKGROUNDS))], (tuple(rng.integers(-2, 3, 2).tolist()),))
        for name in OBJECTS
        for style in STYLES
    ]


def described(scene: Scene) -> str:
    """A caption with the object and the style of a scene."""
    return f"{noun_phrase(scene.objects[0])} in {scene.style} style"


@torch.no_grad()
def attention(pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int = 10, batch: int = 60) -> Maps:
    """Read the maps of the objects' words from renders under the noise of each step of a drawing.

    Args:
        pipe: The model.
        scenes: With one object each.
        steps: Noise levels.
        batch: Scenes at once.
    """
    images = np.stack([render(scene).image for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = [_read(pipe, scenes[i : i + batch], pixels[i : i + batch], steps) for i in range(0, len(scenes), batch)]
    share = torch.cat([part[0] for part in parts])
    return Maps(scenes, pixels, share, {side: torch.cat([part[1][side] for part in parts]) for side in parts[0][1]})


def _read(
    pipe: StableDiffusionPipeline, scenes: list[Scene], pixels: Tensor, steps: int
) -> tuple[Tensor, dict[int, Tensor]]:
    captions = [described(scene) for scene in scenes]
    ids = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(ids)[0]
    marked = object_tokens(pipe.tokenizer, ids, scenes)[..., :1]
    clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    control = AttentionController(pipe.unet, Layout((clean.shape[2], clean.shape[3]), len(scenes)))
    control.capture(marked, [site for site in attention_sites(pipe.unet) if site.kind == "cross"])
    pipe.scheduler.set_timesteps(steps)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    shares: list[Tensor] = []
    grids: dict[int, list[Tensor]] = {}
    with control:
        for t in pipe.scheduler.timesteps:
            pipe.unet(pipe.scheduler.add_noise(clean, noise, t[None]), t, states)
            for drawn in control.maps.values():
                shares.append(drawn[:, 0].mean((1, 2)))
                grids.setdefault(drawn.shape[-1], []).append(drawn[:, 0])
    return torch.stack(shares).mean(0), {side: torch.stack(maps).mean(0) for side, maps in grids.items()}


def figures(maps: Maps) -> dict[str, float]:
    """`word_share`, and `word_auc_N`: area under the ROC curve of the map of N tokens a side against the true mask.

    A token is on the object when half of it is covered. Means over scenes.
    """
    made = {"word_share": float(maps.share.mean())}
    for side, each in sorted(maps.grids.items()):
        truth = object_masks(maps.scenes, side)[:, 0] >= 0.5
        areas = [area(one[on], one[~on]) for one, on in zip(each, truth, strict=True) if on.any() and not on.all()]
        made[f"word_auc_{side}"] = float(np.mean(areas))
    return made


def rows(found: Mapping[str, float]) -> list[Row]:
    """The shipped model's row of the table, from its figures; see `figures`."""
    trained = json.loads((path("canvas-sd") / FILE).read_text())["training"]
    names = [name for name in found if name.startswith("word_")]
    shares = {name: round(found[name], 4) for name in names}
    return [{"model": SHIPPED, "steps": trained["steps"]["words"], **shares}]


@torch.no_grad()
def by_words_alone(pipe: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    """Encode prompts, with the empty prompt's states of end token and padding, `(prompts, tokens, dim)`."""
    ids = pipe.tokenizer(["", *prompts], padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(ids)[0]
    return without_end(states[1:], ids[1:], states[0], pipe.tokenizer.eos_token_id)


def stock() -> StableDiffusionPipeline:
    """The shipped model, in float32."""
    pipe = StableDiffusionPipeline.from_pretrained(path("canvas-sd"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure() -> dict[str, float]:
    """Measure the shipped model; see `figures` and `drawn_by_words_alone`."""
    pipe = stock()
    return {**figures(attention(pipe, plan())), **drawn_by_words_alone(pipe, plan()[::2])}


def drawn_by_words_alone(pipe: StableDiffusionPipeline, scenes: list[Scene], batch: int = 20) -> dict[str, float]:
    """Share of images by words alone (see `by_words_alone`) that show the object, and that are in the style.

    Args:
        pipe: The model.
        scenes: With one object each.
        batch: Images at once.
    """
    states = by_words_alone(pipe, [described(scene) for scene in scenes])
    images: list[Image.Image] = []
    for first in range(0, len(scenes), batch):
        part = states[first : first + batch]
        generators = [torch.Generator().manual_seed(1000 + first + row) for row in range(len(part))]
        images += pipe(prompt_embeds=part, generator=generators, **GENERATION).images
    answers = CanvasJudge()(images)
    return {
        "words_alone_object": float(np.mean([a.object == s.objects[0] for a, s in zip(answers, scenes, strict=True)])),
        "words_alone_style": float(np.mean([a.style == s.style for a, s in zip(answers, scenes, strict=True)])),
    }


def picture(before: Path | None = None, columns: int = 12, grid: int = 8) -> Image.Image:
    """Scenes, and below each what its object's word draws, over the greatest value of the map.

    Args:
        before: Folder of a UNet whose maps stand in a row between; left out when `None`.
        columns: Scenes.
        grid: Side of the maps that are shown.
    """
    pipe = stock()
    scenes = plan()[:: len(plan()) // columns][:columns]
    unets = [pipe.unet] if before is None else [UNet2DConditionModel.from_pretrained(before), pipe.unet]
    rows: list[Image.Image] = []
    for unet in unets:
        pipe.unet = unet
        maps = attention(pipe, scenes)
        if not rows:
            rows += [Image.fromarray(pixels) for pixels in _bytes(maps.pixels / 2 + 0.5)]
        shown = maps.grids[grid][:, None] / maps.grids[grid].amax((1, 2))[:, None, None, None]
        large = F.interpolate(shown, maps.pixels.shape[2:], mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
        rows += [Image.fromarray(pixels) for pixels in _bytes(large)]
    return sheet(rows, columns)


def _bytes(pixels: Tensor) -> np.ndarray:
    return (pixels.permute(0, 2, 3, 1) * 255).round().byte().numpy()
