"""Erasures that are made by hand, for pipelines of any family, and what pipelines are told besides a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from erasure import Concept, Erasure
from erasure.artifact import ErasureConfig
from erasure.backbones import backbone_for
from erasure.carriers.edits import Edits, LowRank
from erasure.errors import BypassedErasureWarning


def hand_made(pipe: Any, *components: str, block: int = 0, **config: Any) -> Erasure:
    """An edit of the attention of one block of some text encoders, or of a door of the denoiser."""
    backbone, edits = backbone_for(pipe), {}
    for component in components:
        if component == backbone.denoiser_component:
            entry = backbone.entry_layers()[0]
            edits[entry.key] = _edit(entry.module)
        else:
            tower = backbone.tower(component)
            path = tower.attention_out(block)
            edits[tower.key(path)] = _edit(tower.root.get_submodule(path))
    made = ErasureConfig(
        "hand", [Concept("cat", anchor="dog").to_dict()], backbone.family, carriers=["weights"], **config
    )
    return Erasure(made, Edits(edits))


def _edit(layer: Any) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(size, generator=generator) for size in ((layer.out_features, 1), (1, layer.in_features)))
    return LowRank(down=down, up=up)


def embeddings(pipe: Any, prompt: str = "a photo of a cat") -> dict[str, torch.Tensor]:
    """What the family's call takes in the place of a prompt."""
    made = pipe.encode_prompt(prompt, **({"prompt_2": None} if hasattr(pipe, "text_encoder_2") else {}),
                              device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)  # fmt: skip
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, made, strict=False))


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is said of ways around inside of the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedErasureWarning)
        yield
