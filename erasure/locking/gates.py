"""Detection of erased concepts in prompts by the gates of attached erasures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from erasure.attach import ErasureManager
from erasure.backbones import backbone_for
from erasure.carriers.gating import Gating
from erasure.errors import AttachError
from erasure.guards import unguarded
from erasure.interop.scopes import same_gradient_mode
from erasure.sae.detection import detect_with
from erasure.twins import states_of


class Gates:
    """The gates of the erasures in force on a pipeline: of edited features (`itd`), and of branches (`spm`).

    Args:
        pipe: The pipeline.

    Raises:
        AttachError: No attached erasure has gates.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        states = states_of(pipe)
        in_force = {name: one.erasure for state in states.values() for name, one in state.in_force().items()}
        self.features = {name: made for name, made in in_force.items() if made.edits.features}
        denoiser = states.get(backbone_for(pipe).denoiser_component)
        self.branches = [] if denoiser is None else denoiser.gates()
        branched = [] if denoiser is None else denoiser.gated()
        self.concepts = [[concept.target for concept in one.erasure.concepts] for one in branched]
        gated = [name for name, made in in_force.items() if any(made is one.erasure for one in branched)]
        self.names = [*self.features, *gated]
        """Names of the erasures that have gates."""
        if not self.names:
            raise AttachError(
                f"none of the erasures in force ({', '.join(in_force)}) has gates that tell concepts in prompts: "
                "attach one that was made with itd or spm, or lock without prompts=True"
            )
        # Its own towers: feature edits are asked about what the stock text encoders give.
        self.stock = backbone_for(ErasureManager(pipe).stock()).towers if self.features else []

    def found(self, prompts: Sequence[str]) -> list[Mapping[str, float]]:
        """Give, for each prompt, the concepts whose gate it opens, with scores."""
        holding: list[dict[str, float]] = [{} for _ in prompts]
        if self.features:
            for each, row in zip(detect_with(self.stock, self.features.values(), prompts), holding, strict=True):
                row |= {concept: detection.score for concept, detection in each.items() if detection.present}
        if self.branches:
            with unguarded(), same_gradient_mode(), torch.no_grad():
                conditioning = backbone_for(self.pipe).encode(list(prompts))
            parts = {"tokens": conditioning.tokens, "pooled": conditioning.pooled}
            for term, concepts in zip(self.branches, self.concepts, strict=True):
                opened = Gating.of_rows(term, parts, len(prompts), len(prompts))
                for row, gates in zip(holding, opened.tolist(), strict=True):
                    row |= {concept: gate for concept, gate in zip(concepts, gates, strict=True) if gate > 0}
        return list(holding)
