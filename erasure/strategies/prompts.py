"""Prompts that strategies sample in training, and the anchors of concepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from erasure import files
from erasure.backbones import Backbone, TextTower
from erasure.concept import Concept, key
from erasure.errors import ConceptError, OptionError
from erasure.interop import paths
from erasure.text.corpora import context_prompts, retain_prompts, vocabulary, vocabulary_prompts
from erasure.text.words import AlignedPrompt, aligned_prompts, without
from erasure.training.states import Scene
from erasure.world import World

CLOSER = 64
"""Number of words with the nearest token embeddings that are then compared by the text encoder."""
LARGEST_LIST = 64 * 2**20
"""Largest size in bytes of a file of prompts."""


def concept_scenes(
    tower: TextTower, concepts: Sequence[Concept], seed: int, contexts: int, *, anchored: bool, scope: bool
) -> list[Scene]:
    """Make the prompts with concepts to sample: every phrasing, and random prompts with the concept among other words.

    Args:
        tower: Tokenises them.
        concepts: Concepts to erase.
        seed: Seed of the random prompts.
        contexts: Number of random prompts for each concept.
        anchored: Let the teacher predict for the same prompt with the anchor too (the empty prompt where a concept has
            none).
        scope: Let the teacher predict, last, for the prompt without the concept's words too.
    """
    scenes = []
    for concept, pair in prompt_pairs(tower, concepts, seed, contexts):
        asks: list[str | None] = [pair.anchor_prompt if concept.anchor else None] if anchored else []
        asks += [without(pair.prompt, concept)] if scope else []
        scenes.append(Scene(pair.prompt, tuple(asks)))
    return list(dict.fromkeys(scenes))


def anchor_scenes(
    tower: TextTower, concepts: Sequence[Concept], seed: int, contexts: int, *, scope: bool
) -> list[Scene]:
    """Make prompts with anchors to sample, and the prompts with the concepts that are trained on their states.

    Args:
        tower: Tokenises them.
        concepts: Concepts that all have an anchor, see `anchored`.
        seed: Seed of the random prompts.
        contexts: Number of random prompts for each concept.
        scope: Let the teacher predict for the prompt without the concept's words too.
    """
    return list(
        dict.fromkeys(
            Scene(pair.anchor_prompt, (without(pair.prompt, concept),) if scope else (), instead=pair.prompt)
            for concept, pair in prompt_pairs(tower, concepts, seed, contexts)
        )
    )


def prompt_pairs(
    tower: TextTower, concepts: Sequence[Concept], seed: int, contexts: int
) -> Iterator[tuple[Concept, AlignedPrompt]]:
    """Yield each concept's phrasings and `contexts` random prompts with it, aligned with its anchor's prompts."""
    generator = torch.Generator().manual_seed(seed)
    words = vocabulary(tower, concepts)
    for concept in concepts:
        pairs = aligned_prompts(tower, concept)
        if words and contexts:
            pairs += context_prompts(tower, concept, words, contexts, generator)
        yield from ((concept, pair) for pair in pairs)


def retain_scenes(tower: TextTower, concepts: Sequence[Concept], seed: int, count: int) -> list[Scene]:
    """Make the prompts that must survive: the empty prompt, those of the retain lists, and `count` random ones."""
    words = vocabulary(tower, concepts)
    generator = torch.Generator().manual_seed(seed + 1)
    random = vocabulary_prompts(words, count, generator) if words else []
    return [Scene(prompt) for prompt in dict.fromkeys([*retain_prompts(concepts), *random])]


def look_alikes(tower: TextTower, concept: Concept, concepts: Sequence[Concept], count: int) -> list[str]:
    """Choose the words nearest to a concept that must survive, from its retain list or from the model's world.

    Words of the tokeniser are used where there is no retain list and the model's world declares nothing.

    Args:
        tower: Text encoder that measures distances, by its state after the last token; of many words, only those with
            the nearest token embeddings are encoded.
        concept: Concept to be near.
        concepts: All erased concepts.
        count: Largest number of words.
    """
    world, gone = World.of(tower.pipe), {key(name) for each in concepts for name in each.names}
    listed = concept.retain or (world.styles if concept.kind == "style" else world.objects)
    words = [word for word in listed or vocabulary(tower, concepts) if key(word) not in gone]
    if len(words) > CLOSER:
        table = F.normalize(paths.token_table(tower.root).weight.detach().float(), dim=1)
        own = table[tower.word_ids(concept.target)].mean(0)
        known = [table[tower.word_ids(word)].mean(0) @ own for word in words]
        words = [words[index] for index in torch.stack(known).topk(CLOSER).indices.tolist()]
    if not words:
        return []
    tokens = tower.tokenize([concept.target, *words])
    with torch.no_grad():
        states = tower.encode(tokens).states.float()
    said = F.normalize(states[torch.arange(len(states)), torch.tensor(tokens.lengths) - 1], dim=1)
    nearest = (said[1:] @ said[0]).topk(min(count, len(words))).indices
    return [words[index] for index in nearest.tolist()]


def earlier_scenes(tower: TextTower, concepts: Sequence[Concept], seed: int, contexts: int) -> list[Scene]:
    """Make prompts with the concepts of an erasure in force, and with the names on their retain lists.

    Args:
        tower: Tokenises them.
        concepts: Concepts of the erasure in force; may be empty.
        seed: Seed of the random prompts.
        contexts: Number of random prompts that name the concepts among other words, for all concepts together.
    """
    prompts = [prompt for concept in concepts for prompt in concept.prompts()] + retain_prompts(concepts)
    words = vocabulary(tower, concepts) if concepts else []
    generator = torch.Generator().manual_seed(seed + 2)
    for number in range(contexts if words else 0):
        concept = concepts[number % len(concepts)]
        prompts += [pair.prompt for pair in context_prompts(tower, concept, words, 1, generator)]
    return [Scene(prompt) for prompt in dict.fromkeys(prompts)]


def photo_scenes(tower: TextTower, concepts: Sequence[Concept], seed: int, count: int) -> list[Scene]:
    """Make `count` prompts "a photo of X" that must survive: X are names on retain lists, then random words."""
    listed = [word for concept in concepts for word in concept.retain]
    words = [word for word in vocabulary(tower, concepts) if word not in listed]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    every = list(dict.fromkeys([*listed, *(words[i] for i in order)]))
    return [Scene(f"a photo of {word}") for word in every[: max(count, len(listed))]]


def listed_scenes(path: str) -> list[Scene]:
    """Read prompts from a file: one per line, or the column `prompt` of a CSV or TSV file; each prompt once.

    Raises:
        OptionError: The file cannot be read, holds no prompt or has no such column.
    """
    prompts = list(dict.fromkeys(files.read_texts(path, LARGEST_LIST, error=OptionError)))
    if not prompts:
        raise OptionError(f"{path} holds no prompt: write one on each line")
    return [Scene(prompt) for prompt in prompts]


def anchor_of(backbone: Backbone | TextTower, concept: Concept, concepts: Sequence[Concept]) -> Concept | None:
    """Choose the anchor of a concept: its own, or the one that the model's world suggests.

    Where the anchor is erased as well, the anchor's own anchor is used.
    """
    erased = {key(name): other for other in concepts for name in other.names}
    word, passed = concept.anchor, {key(concept.target)}
    while word and key(word) in erased and key(word) not in passed:
        passed.add(key(word))
        word = erased[key(word)].anchor
    if word is None or key(word) in erased:
        word = World.of(backbone.pipe).anchor(concept.target, [other.target for other in concepts])
    return Concept(word, kind=concept.kind, templates=concept.templates) if word else None


def anchored(tower: TextTower, concepts: Sequence[Concept], strategy: str) -> list[Concept]:
    """Give the concepts, each with its anchor, see `anchor_of`. An empty anchor stays: nothing replaces the concept.

    Raises:
        ConceptError: A concept has no anchor.
    """
    found = []
    for concept in concepts:
        anchor = concept if concept.anchor == "" else anchor_of(tower, concept, concepts)
        if anchor is None:
            raise ConceptError(
                f"{strategy} teaches the model to draw the anchor where {concept.target!r} is asked for, and "
                + (f"its anchor {concept.anchor!r} is to be erased as well" if concept.anchor else "it has none")
                + ": name what shall take its place as its anchor, or '' for nothing"
            )
        found.append(replace(concept, anchor="" if anchor is concept else anchor.target))
    return found
