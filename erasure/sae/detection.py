"""Detection of erased concepts in prompts by the gates of feature edits: the autoencoder as a zero-shot classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.backbones import TextTower, backbone_for
from erasure.carriers.features import BlockEdit, GatedEdit
from erasure.errors import AttachError
from erasure.interop.scopes import same_gradient_mode
from erasure.sae.gates import CHUNK
from erasure.sae.stream import activations
from erasure.text.words import word_mask


class Detection(NamedTuple):
    """Detection result for one concept in one prompt."""

    score: float
    """Score that a word of the prompt names the concept, 0 to 1 (a mean square with `parity="itd"`)."""
    gate: float
    """Smallest score that opens the gate."""
    probe: float | None = None
    """Score of the linear probe, 0 to 1, if there is one."""

    @property
    def present(self) -> bool:
        """Whether the concept is detected in the prompt, and is therefore erased from it."""
        return self.score >= self.gate

    def margin(self) -> float:
        """Difference of score and gate, negative where the gate is closed."""
        return self.score - self.gate


def detect_concepts(pipe: DiffusionPipeline, prompts: str | Sequence[str]) -> list[dict[str, Detection]]:
    """Detect the concepts of the attached feature erasures (`itd`) in prompts; one dictionary by concept per prompt.

    In a model with several text encoders the largest margin counts. Prompts are encoded by a stock copy of the
    pipeline's encoders, so the pipeline itself is not switched.

    Raises:
        AttachError: No attached erasure has gates.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    manager = ErasureManager(pipe)
    known = [erasure for erasure in manager.erasures.values() if erasure.edits.features]
    if not known:
        raise AttachError("no attached erasure can tell concepts in prompts: attach one that was made with itd")
    return detect_with(backbone_for(manager.stock()).towers, known, texts)


def detect_with(
    stock: Sequence[TextTower], erasures: Iterable[Erasure], texts: Sequence[str]
) -> list[dict[str, Detection]]:
    """Detect concepts in prompts with given text encoders, see `detect_concepts`.

    Args:
        stock: The text encoders without erasures.
        erasures: Erasures whose feature edits are used; others are ignored.
        texts: Prompts.
    """
    towers = {tower.component: tower for tower in stock}
    found: list[dict[str, Detection]] = [{} for _ in texts]
    for erasure in erasures:
        for key, edit in erasure.edits.features.items():
            component, path = key.split("/", 1)
            with same_gradient_mode():
                rows = detect(towers[component], int(path.rsplit(".", 1)[1]), edit, texts)
            for row, each in zip(rows, found, strict=True):
                # The released code has one gate for all concepts.
                answers = row * len(erasure.concepts) if len(row) == 1 else row
                for concept, answer in zip(erasure.concepts, answers, strict=True):
                    # A gate that opens in one text encoder opens those of all text encoders.
                    each[concept.target] = max(each.get(concept.target, answer), answer, key=Detection.margin)
    return found


@torch.no_grad()
def detect(tower: TextTower, layer: int, edit: BlockEdit, prompts: Sequence[str]) -> list[list[Detection]]:
    """Compute the detection of each gate of an edit in each prompt; no edit may be in force."""
    placed = edit.on(next(tower.root.parameters()).device)
    gates = edit.gates.tolist()
    found: list[list[Detection]] = []
    for first in range(0, len(prompts), CHUNK):
        tokens = tower.tokenize(prompts[first : first + CHUNK])
        states = activations(tower, layer, tokens).float()
        words = word_mask(tokens.ids, placed.end, placed.first)
        scores = placed.scores(states, words).tolist()
        probes: list[list[float | None]] = [[None] * len(row) for row in scores]
        if isinstance(placed, GatedEdit):
            probes = placed.scores(states, words, by_probe=True).tolist()
        found += [
            [Detection(*each) for each in zip(row, gates, asked, strict=True)]
            for row, asked in zip(scores, probes, strict=True)
        ]
    return found
