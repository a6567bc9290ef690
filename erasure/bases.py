"""The model that an erasure is made for, as its config tells of it: name, commit, and fingerprints of its tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from erasure.backbones import Backbone, backbone_for
from erasure.carriers.edits import Edits
from erasure.carriers.embeddings import learned_tokens
from erasure.carriers.weights import Written, fingerprint, sample
from erasure.concept import Concept
from erasure.errors import UnsupportedModelError
from erasure.interop import paths
from erasure.interop.pipelines import origin


def base_of(backbone: Backbone, edits: Edits, concepts: Sequence[Concept]) -> dict[str, Any]:
    """What an erasure's config says of the model that its edits are for; see `erasure.schema.Base`."""
    pipe, tensors = backbone.pipe, {}
    for key in (*edits.parameters, *_read_parameters(pipe, edits)):
        component, path = key.split("/", 1)
        tensors[key] = fingerprint(paths.parameter(getattr(pipe, component), path))
    model, revision = origin(pipe)
    # Somebody's absolute path tells others nothing, and not theirs to know.
    shown = Path(model).name if os.path.isabs(model) else model
    base: dict[str, Any] = {"model": shown, "revision": revision, "tensors": tensors}
    if backbone.denoiser_component in edits.components:
        # What the denoiser is told to forget stands in the text encoder's own language.
        encoders = {tower.component: fingerprint(sample(tower.module, Written())) for tower in backbone.towers}
        base["text_encoders"] = encoders
    if learned := learned_tokens(backbone.towers, [text for concept in concepts for text in concept.texts()]):
        base["learned_tokens"] = learned
    return base


def size_of(backbone: Backbone) -> list[int] | None:
    """Height and width in pixels of what the model draws; `None` where its latents are of an unknown kind."""
    try:
        latents = backbone.latents
    except UnsupportedModelError:
        # A strategy that edits text encoders draws nothing, so it works without.
        return None
    return [side * latents.factor for side in latents.side]


def _read_parameters(pipe: DiffusionPipeline, edits: Edits) -> list[str]:
    """The parameters of the blocks and layers whose output is edited: edits mean nothing in another model's."""
    told = edits.safety or edits.filters
    found = [f"{layer.key}.weight" for layer in backbone_for(pipe).entry_layers()] if told else []
    found += [f"{key}.weight" for key in edits.membranes]
    for key in edits.features:
        component, block = key.split("/", 1)
        known = paths.canonical_parameters(getattr(pipe, component))
        found += [f"{component}/{path}" for path in known if path.startswith(block + ".")]
    return found
