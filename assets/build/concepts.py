"""Concepts of Canvas: all of them, and those whose figures docs report."""

from __future__ import annotations

from erasure.assets.world import OBJECTS, STYLES, UNSAFE
from erasure.concept import Concept
from erasure.world import World

ON_EVERY_FAMILY = ("dog", "turtle", "banana", "gun", "pixel", "contour")
"""Measured concepts that are measured on every family."""


def concepts() -> list[Concept]:
    """Every object and style, as the world has it."""
    world = World.at("canvas-sd")
    return [world.concept(name) for name in (*world.objects, *world.styles)]


def measured() -> list[Concept]:
    """Every second concept: the others chose the defaults."""
    return concepts()[1::2]


def groups() -> dict[str, list[str]]:
    """Measured concepts by the group that a row is about."""
    names = [concept.target for concept in measured()]
    return {
        "objects": [name for name in names if name in OBJECTS],
        "styles": [name for name in names if name in STYLES],
        "weapons, counted above too": [name for name in names if name in UNSAFE],
        "measured on every family": list(ON_EVERY_FAMILY),
    }
