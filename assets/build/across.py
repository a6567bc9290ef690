"""Compare strategies on the embedded models of all families."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import erasure
from erasure.assets.build import table
from erasure.assets.build.evaluate import generate, load, sheet
from erasure.assets.world import STYLES, noun_phrase
from erasure.backbones import backbone_for
from erasure.strategies import get

MODELS = ("canvas-sd", "canvas-sdxl", "canvas-flux", "canvas-sd3")
STRATEGIES = ("uce", "hirm", "itd", "esd", "advunlearn")
NAMES = ("dog", "turtle", "banana", "gun", "pixel", "contour")
"""Concepts, of those that are reported: four objects, of which one is a weapon, and two styles."""

SHOWN = ("cat", "butterfly", "turtle", "burger", "car", "rocket", "guitar", "house", "castle", "bomb")
"""Objects of the picture, each in the next style."""


def picture(models: Sequence[str]) -> Image.Image:
    """Draw the same prompts with every model, a row for each."""
    prompts = [f"{noun_phrase(name)} in {style} style" for name, style in zip(SHOWN, 2 * list(STYLES), strict=True)]
    images = [image for model in models for image in generate(load(model), prompts, list(range(len(prompts))))]
    return sheet(images, len(prompts), scale=1)


def measure(
    out: Path, models: Sequence[str], strategies: Sequence[str], size: str, share: tuple[int, int]
) -> dict[tuple[str, str], str]:
    """Make and measure an erasure of every concept, by every strategy, on every model; see `table.measure`.

    Args:
        out: Results, a folder for each model.
        models: Names of embedded models.
        strategies: What to compare.
        size: Of the suite.
        share: `i n` takes every n-th concept from the i-th on.

    Returns:
        Why a strategy does not work on a model, by model and strategy, for those that do not.
    """
    reasons = {}
    for model in models:
        backbone = backbone_for(erasure.load_pipeline(model))
        able = []
        for name in strategies:
            lacking = [reason for need in get(name).needs if (reason := backbone.lacks(need))]
            if lacking:
                reasons[model, name] = lacking[0]
            else:
                able.append(name)
        table.measure(out / model, tuple(able), size, share, model=model, only=NAMES)
    return reasons


def markdown(out: Path, models: Sequence[str], strategies: Sequence[str], reasons: dict[tuple[str, str], str]) -> str:
    """One row for each strategy and model: means over the concepts, with intervals; or why there is none.

    Args:
        out: Where `measure` left its results.
        models: Names of embedded models.
        strategies: What was compared.
        reasons: What `measure` gave.
    """
    lines = ["| method | model | UA | IRA | CRA | AA | seconds | kB |", "|---|---|---|---|---|---|---|---|"]
    for name in strategies:
        for model in models:
            if (model, name) in reasons:
                lines.append(f"| `{name}` | `{model}` | {reasons[model, name]} | | | | | |")
                continue
            (row,) = table.rows(out / model, (name,), {"all": NAMES})
            rates = " | ".join(f"{row[k].value:.3f} ({row[k].low:.2f}-{row[k].high:.2f})" for k in table.RATES)
            lines.append(f"| `{name}` | `{model}` | {rates} | {row['seconds']:.1f} | {row['kB']:.0f} |")
    return "\n".join(lines)
