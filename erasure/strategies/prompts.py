"""What strategies roll out, and what takes the place of a concept."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

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
"""Words near to a concept by their embeddings, of which the text encoder is asked."""
LARGEST_LIST = 64 * 2**20
"""Bytes of a file of prompts."""


def concept_scenes(
    tower: TextTower, concepts: Sequence[Concept], seed: int, contexts: int, *, anchored: bool, scope: bool
) -> list[Scene]:
    """Prompts with concepts to roll out: every phrasing, and random company.

    Args:
        tower: Tokenises them.
        concepts: Which.
        seed: Of the company.
        contexts: Random prompts for each concept.
        anchored: Ask the teacher about the same prompt with the anchor as well (no prompt where a concept has none).
        scope: And about the prompt without the concept's words, last.
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
    """Prompts with the anchors of concepts to roll out, and with the concepts to learn at their states.

    Args:
        tower: Tokenises them.
        concepts: All with an anchor, see `anchored`.
        seed: Of the company.
        contexts: Random prompts for each concept.
        scope: Ask the teacher about the prompt without the concept's words.
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
    """Every phrasing of each concept and `contexts` random prompts with it, aligned with those of its anchor."""
    generator = torch.Generator().manual_seed(seed)
    words = vocabulary(tower, concepts)
    for concept in concepts:
        pairs = aligned_prompts(tower, concept)
        if words and contexts:
            pairs += context_prompts(tower, concept, words, contexts, generator)
        yield from ((concept, pair) for pair in pairs)


def retain_scenes(tower: TextTower, concepts: Sequence[Concept], seed: int, count: int) -> list[Scene]:
    """Prompts that must survive: the empty one, those of the retain lists, and `count` random ones."""
    words = vocabulary(tower, concepts)
    generator = torch.Generator().manual_seed(seed + 1)
    random = vocabulary_prompts(words, count, generator) if words else []
    return [Scene(prompt) for prompt in dict.fromkeys([*retain_prompts(concepts), *random])]


def look_alikes(tower: TextTower, concept: Concept, concepts: Sequence[Concept], count: int) -> list[str]:
    """The words nearest to a concept that must survive: of its retain list, or of what the model's world has.

    A model whose world declares nothing is asked for the words of its tokeniser.

    Args:
        tower: Says what is near: by its state behind the last token, and among many words by their embeddings first.
        concept: What they are near to.
        concepts: All that is erased.
        count: How many words at most.
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


def standing_scenes(tower: TextTower, concepts: Sequence[Concept], seed: int, contexts: int) -> list[Scene]:
    """Prompts with concepts that an erasure in force erases, and with what these retain.

    Args:
        tower: Tokenises them.
        concepts: Which; there may be none.
        seed: Of the company.
        contexts: Random prompts that name them among other words, over all of them in turn.
    """
    prompts = [prompt for concept in concepts for prompt in concept.prompts()] + retain_prompts(concepts)
    words = vocabulary(tower, concepts) if concepts else []
    generator = torch.Generator().manual_seed(seed + 2)
    for number in range(contexts if words else 0):
        concept = concepts[number % len(concepts)]
        prompts += [pair.prompt for pair in context_prompts(tower, concept, words, 1, generator)]
    return [Scene(prompt) for prompt in dict.fromkeys(prompts)]


def photo_scenes(tower: TextTower, concepts: Sequence[Concept], seed: int, count: int) -> list[Scene]:
    """`count` prompts "a photo of X" that must survive: X of the retain lists, then random words of the tokeniser."""
    listed = [word for concept in concepts for word in concept.retain]
    words = [word for word in vocabulary(tower, concepts) if word not in listed]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    every = list(dict.fromkeys([*listed, *(words[i] for i in order)]))
    return [Scene(f"a photo of {word}") for word in every[: max(count, len(listed))]]


def listed_scenes(path: str) -> list[Scene]:
    """Prompts of a file: one a line, or the column `prompt` of a CSV file; each once.

    Raises:
        OptionError: The file cannot be read, holds no prompt or has no such column.
    """
    text = files.read_text(Path(path), LARGEST_LIST, error=OptionError)
    rows = text.splitlines()
    if path.lower().endswith(".csv"):
        table = csv.DictReader(io.StringIO(text))
        if "prompt" not in (table.fieldnames or ()):
            raise OptionError(f"{path} has the columns {table.fieldnames}, expected one that is called 'prompt'")
        rows = [row["prompt"] or "" for row in table]
    prompts = list(dict.fromkeys(row.strip() for row in rows if row.strip()))
    if not prompts:
        raise OptionError(f"{path} holds no prompt: write one on each line")
    return [Scene(prompt) for prompt in prompts]


def anchor_of(backbone: Backbone | TextTower, concept: Concept, concepts: Sequence[Concept]) -> Concept | None:
    """Choose what takes the place of a concept: its own anchor, or the one that the model's world suggests.

    Where the anchor is erased as well, what takes its place takes the concept's too.
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
    """Concepts, each with what takes its place: see `anchor_of`. An anchor of '' stays: nothing takes the place.

    Raises:
        ConceptError: There is none for one of them.
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
