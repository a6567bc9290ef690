"""Draw the same prompts with the embedded models of all families; `across.toml` compares strategies on them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from erasure.assets.build.evaluate import generate, load, sheet
from erasure.assets.world import STYLES, noun_phrase

SHOWN = ("cat", "butterfly", "turtle", "burger", "car", "rocket", "guitar", "house", "castle", "bomb")
"""Objects of the picture, each in the next style."""


def picture(models: Sequence[str]) -> Image.Image:
    """Draw the same prompts with every model, a row for each."""
    prompts = [f"{noun_phrase(name)} in {style} style" for name, style in zip(SHOWN, 2 * list(STYLES), strict=True)]
    images = [image for model in models for image in generate(load(model), prompts, list(range(len(prompts))))]
    return sheet(images, len(prompts), scale=1)
