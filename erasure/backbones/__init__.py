"""Everything that differs between model families, behind one protocol."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from erasure.backbones.base import Backbone, Conditioning, EntryLayer
from erasure.backbones.sites import AttentionSite, attention_sites
from erasure.backbones.stable_diffusion import StableDiffusionBackbone
from erasure.backbones.towers import PromptTokens, TextTower, text_towers
from erasure.errors import UnsupportedModelError

FAMILIES: tuple[type[Backbone], ...] = (StableDiffusionBackbone,)
"""Known families; the first that matches a pipeline is taken."""


def backbone_for(pipe: DiffusionPipeline) -> Backbone:
    """The backbone of a pipeline.

    Raises:
        UnsupportedModelError: No family matches.
    """
    for family in FAMILIES:
        if family.matches(pipe):
            return family(pipe)
    known = ", ".join(family.family for family in FAMILIES)
    raise UnsupportedModelError(f"{type(pipe).__name__} belongs to no supported family ({known})")


__all__ = [
    "FAMILIES",
    "AttentionSite",
    "Backbone",
    "Conditioning",
    "EntryLayer",
    "PromptTokens",
    "TextTower",
    "attention_sites",
    "backbone_for",
    "text_towers",
]
