"""Everything that differs between model families, behind one protocol."""

from __future__ import annotations

from diffusers import DiffusionPipeline
from torch import nn

from erasure.backbones.base import Backbone, EntryLayer, TokenRun
from erasure.backbones.conditioning import Conditioning
from erasure.backbones.flux import ChromaBackbone, FluxBackbone
from erasure.backbones.later import known_of
from erasure.backbones.sites import AttentionSite, attention_sites
from erasure.backbones.stable_diffusion import StableDiffusionBackbone
from erasure.backbones.stable_diffusion_3 import StableDiffusion3Backbone
from erasure.backbones.stable_diffusion_xl import StableDiffusionXLBackbone
from erasure.backbones.towers import PromptTokens, TextTower, TowerOutput, text_towers
from erasure.errors import UnsupportedModelError
from erasure.interop import paths
from erasure.interop.pipelines import check_is_pipeline
from erasure.world import World

FAMILIES: tuple[type[Backbone], ...] = (
    StableDiffusionBackbone, StableDiffusionXLBackbone, StableDiffusion3Backbone, FluxBackbone, ChromaBackbone,
)  # fmt: skip
"""Known families; the first one that matches a pipeline is used."""


def backbone_for(
    pipe: DiffusionPipeline, *, size: tuple[int, int] | None = None, length: int | None = None
) -> Backbone:
    """Make the backbone of a pipeline: the interface to its model family.

    Args:
        pipe: The pipeline.
        size: See `Backbone`; what the model declares (`erasure.world.World`) when left out.
        length: See `Backbone`; what the model declares when left out.

    Raises:
        UnsupportedModelError: It is no pipeline, no family matches, or a component is missing without which no prompt
            can be encoded.
        ArtifactError: The model's `canvas.json` is damaged.
    """
    check_is_pipeline(pipe)
    for family in FAMILIES:
        if family.matches(pipe):
            world = World.of(pipe)
            return family(pipe, size=size or world.size, length=length or world.text_length)
    known = ", ".join(family.family for family in FAMILIES)
    denoisers = (pipe.components.get(name) for name in ("unet", "transformer"))
    kinds = [type(paths.uncompiled(part)).__name__ for part in denoisers if isinstance(part, nn.Module)]
    found = f" with a {kinds[0]}" if kinds else ""
    hint = next(filter(None, map(known_of, [*kinds, type(pipe).__name__])), "")
    raise UnsupportedModelError(f"{type(pipe).__name__}{found} belongs to no supported family ({known}){hint}")


def family_named(family: str) -> type[Backbone] | None:
    """Find the class of a family; `None` for an unknown name."""
    return next((known for known in FAMILIES if known.family == family), None)


def reads_kohya_names(family: str) -> bool:
    """Whether the loaders of a family's models read kohya's names of LoRA layers."""
    known = family_named(family)
    return known is not None and known.reads_kohya_names


__all__ = [
    "FAMILIES",
    "AttentionSite",
    "Backbone",
    "Conditioning",
    "EntryLayer",
    "PromptTokens",
    "TextTower",
    "TokenRun",
    "TowerOutput",
    "attention_sites",
    "backbone_for",
    "family_named",
    "known_of",
    "reads_kohya_names",
    "text_towers",
]
