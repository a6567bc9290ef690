"""Description of an erasure's base model in its config: name, commit, and fingerprints of its tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from erasure.backbones import Backbone, backbone_for
from erasure.carriers.edits import Edits
from erasure.carriers.embeddings import learned_tokens
from erasure.carriers.weights import WrittenEdits, fingerprint, sample
from erasure.concept import Concept
from erasure.errors import UnsupportedModelError
from erasure.interop import paths
from erasure.interop.pipelines import origin


def base_of(backbone: Backbone, edits: Edits, concepts: Sequence[Concept]) -> dict[str, Any]:
    """Describe the base model of edits for an erasure's config; see `erasure.schema.Base`."""
    pipe, tensors = backbone.pipe, {}
    for key in (*edits.parameters, *_read_parameters(pipe, edits)):
        component, path = key.split("/", 1)
        tensors[key] = fingerprint(paths.parameter(getattr(pipe, component), path))
    model, revision = origin(pipe)
    # An absolute path is private and means nothing to others, so only its last part is written.
    shown = Path(model).name if os.path.isabs(model) else model
    base: dict[str, Any] = {"model": shown, "revision": revision, "tensors": tensors}
    if backbone.denoiser_component in edits.components:
        # Edits of the denoiser are fitted to the outputs of these text encoders.
        encoders = {tower.component: fingerprint(sample(tower.module, WrittenEdits())) for tower in backbone.towers}
        base["text_encoders"] = encoders
    if learned := learned_tokens(backbone.towers, [text for concept in concepts for text in concept.texts()]):
        base["learned_tokens"] = learned
    return base


def size_of(backbone: Backbone) -> list[int] | None:
    """Give the height and width in pixels of the model's images; `None` where its latents are of an unknown kind."""
    try:
        latents = backbone.latents
    except UnsupportedModelError:
        # A strategy that edits text encoders works without the size.
        return None
    return [side * latents.factor for side in latents.side]


def _read_parameters(pipe: DiffusionPipeline, edits: Edits) -> list[str]:
    """List the parameters of blocks and layers whose output is edited, because the edits depend on them."""
    reads_conditioning = edits.safety or edits.filters
    found = [f"{layer.key}.weight" for layer in backbone_for(pipe).entry_layers()] if reads_conditioning else []
    found += [f"{key}.weight" for key in edits.membranes]
    for key in edits.features:
        component, block = key.split("/", 1)
        known = paths.canonical_parameters(getattr(pipe, component))
        found += [f"{component}/{path}" for path in known if path.startswith(block + ".")]
    return found
