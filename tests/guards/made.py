"""Erasures that are made by hand, for pipelines of any family, and what pipelines are told besides a prompt."""

from __future__ import annotations

import inspect
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


def small(pipe: Any) -> dict[str, Any]:
    """Arguments of a call that is soon over."""
    known = inspect.signature(type(pipe).__call__).parameters
    options = {
        "height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent", "max_sequence_length": 32,
    }  # fmt: skip
    return {name: value for name, value in options.items() if name in known}


def embeddings(pipe: Any, prompt: str = "a photo of a cat", length: int = 32) -> dict[str, torch.Tensor]:
    """What the family's call takes in the place of a prompt."""
    known = inspect.signature(type(pipe).encode_prompt).parameters
    options = {
        "prompt_2": None, "prompt_3": None, "device": "cpu", "num_images_per_prompt": 1, "negative_prompt": "",
        "do_classifier_free_guidance": True, "max_sequence_length": length,
    }  # fmt: skip
    made = pipe.encode_prompt(prompt, **{name: value for name, value in options.items() if name in known})
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    if len(made) == 3:
        names = ["prompt_embeds", "pooled_prompt_embeds", "text_ids"]
    elif len(made) == 6:
        half = ["prompt_embeds", "text_ids", "prompt_attention_mask"]
        names = [*half, *(f"negative_{name}" for name in half)]
    return {name: value for name, value in zip(names, made, strict=False) if not name.endswith("text_ids")}


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is said of ways around inside of the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedErasureWarning)
        yield
