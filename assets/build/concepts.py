"""The concepts of Canvas."""

from __future__ import annotations

from erasure.concept import Concept
from erasure.world import World


def concepts() -> list[Concept]:
    """List every object and style, as the world has it.

    Every second one is measured; the others chose the defaults.
    """
    world = World.at("canvas-sd")
    return [world.concept(name) for name in (*world.objects, *world.styles)]
