"""Gates that compare prompts with concepts for `erasure.carriers.permeability`, and measurement of their floors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.carriers.permeability import NO_TOKEN, POOLED, TOKENS, PromptGate, nearness, summed_up
from erasure.concept import Concept
from erasure.strategies.prompts import retain_scenes
from erasure.text.corpora import vocabulary, vocabulary_prompts
from erasure.text.encodings import require_finite
from erasure.text.words import spellings
from erasure.training.states import stable_seed
from erasure.world import World

ORDINARY = 256
"""Number of random prompts without the concept on which a gate's floor is measured, in addition to retained
prompts."""
MARGIN = 1e-3
"""Distance of the floor above the most similar of these prompts. Half precision changes cosines by less."""
AT_ONCE = 16
"""Number of prompts that are encoded at once."""


@torch.no_grad()
def prompt_gates(
    backbone: Backbone, concepts: Sequence[Concept], seed: int, *, floor: float | None, retained: int,
    factors: bool, negatives: bool,
) -> dict[str, PromptGate]:  # fmt: skip
    """Make the gates of concepts, one for each text encoder that the denoiser reads, by `denoiser/text encoder`.

    Args:
        backbone: The stock model.
        concepts: Concepts whose names open the gates; other words that the model's world declares for them count as
            names.
        seed: Seed of random prompts.
        floor: Permeability below which a gate is closed; measured when `None`, see `floor_of`.
        retained: Number of random prompts that must survive.
        factors: See `PromptGate.rules`.
        negatives: See `PromptGate.rules`.
    """
    parts_read = {part.component: (POOLED, part) for part in backbone.pooled()}
    parts_read |= {part.component: (TOKENS, part) for part in backbone.written()}
    made = {}
    for tower in (tower for tower in backbone.towers if tower.component in parts_read):
        source, part = parts_read[tower.component]
        first, last, columns = part.places.start or 0, part.places.stop, part.columns
        place = [source, first, 0 if last is None else last - first, columns.start, columns.stop - columns.start]
        gate = gate_of(tower, concepts)._replace(
            place=torch.tensor(place), rules=torch.tensor([tower.causal, factors, negatives]).long()
        )
        if floor is None:
            floors = [floor_of(tower, gate, number, concepts, seed, retained) for number in range(len(concepts))]
        else:
            floors = [floor] * len(concepts)
        made[f"{backbone.denoiser_component}/{tower.component}"] = gate._replace(floor=torch.tensor(floors))
    return made


def gate_of(tower: TextTower, concepts: Sequence[Concept]) -> PromptGate:
    """Encode the names of concepts with one text encoder, in a gate whose floor is 0."""
    world = World.of(tower.pipe)
    names, spelled, owners = list[str](), list[list[int]](), list[int]()
    for number, concept in enumerate(concepts):
        for name in dict.fromkeys(other for own in concept.names for other in (own, *world.words(own))):
            for ids in spellings(tower, name):
                names.append(name)
                spelled.append(ids)
                owners.append(number)
    marks, longest = torch.tensor([tower.leading, tower.end]), max(map(len, spelled))
    return PromptGate(
        torch.stack([summed_up(states, ids, marks, tower.causal) for states, ids in encoded(tower, names)]).half(),
        torch.tensor([ids + [NO_TOKEN] * (longest - len(ids)) for ids in spelled]), torch.tensor(owners),
        torch.zeros(len(concepts)), torch.zeros(5).long(), marks, torch.zeros(3).long(),
    )  # fmt: skip


def floor_of(
    tower: TextTower, gate: PromptGate, number: int, concepts: Sequence[Concept], seed: int, retained: int
) -> float:
    """Measure a floor just above the permeability of every prompt that must survive; at most 1.

    Args:
        tower: Reads the prompts.
        gate: Gate of this text encoder.
        number: Index of the concept.
        concepts: All concepts of the gate.
        seed: Seed of random prompts.
        retained: Number of random prompts that must survive, in addition to `ORDINARY` others.
    """
    own = [concepts[number]]
    words, generator = vocabulary(tower, own), torch.Generator().manual_seed(stable_seed(seed, "floor"))
    random = vocabulary_prompts(words, ORDINARY, generator) if words else []
    prompts = [*(scene.prompt or "" for scene in retain_scenes(tower, own, seed, retained)), *random]
    near = [float(nearness(gate, states, ids)[number]) for states, ids in encoded(tower, list(dict.fromkeys(prompts)))]
    return min(1.0, max(near) + MARGIN)


def encoded(tower: TextTower, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Encode each prompt: its states `(tokens, dim)` and its token ids `(tokens,)`.

    Raises:
        DivergenceError: The text encoder gives NaN or infinity.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(prompts), AT_ONCE):
        tokens = tower.tokenize(list(prompts[first : first + AT_ONCE]))
        states = tower.module(tokens.ids, attention_mask=tokens.attention_mask).last_hidden_state.float().cpu()
        require_finite(tower, states, f"for {prompts[first]!r}")
        found += zip(states, tokens.ids.cpu(), strict=True)
    return found
