"""Prompts with a concept, and random prompts without it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional as F

from erasure.backbones import TextTower
from erasure.concept import TEMPLATES, Concept, numbers
from erasure.interop import paths
from erasure.text.words import AlignedPrompt, align
from erasure.world import World


def retain_prompts(concepts: Sequence[Concept]) -> list[str]:
    """Give the empty prompt and every phrasing of the concepts' retain lists."""
    prompts = [""]
    for concept in concepts:
        prompts += [template.format(words) for words in concept.retain for template in concept.phrasings()]
    return list(dict.fromkeys(prompts))


SAME = 0.95
"""Cosine of two token embeddings above which the text encoder cannot distinguish them."""


def vocabulary(tower: TextTower, concepts: Sequence[Concept]) -> list[str]:
    """List all words that are one token, without single letters and words of the concepts.

    Words of a concept are its names, other words for it in the model's world, and their singulars and plurals; also
    words whose embedding nearly equals that of one of its tokens (for instance a token learned from them), because
    they cannot be kept when the concept is erased.
    """
    world = World.of(tower.pipe)
    names = [word for concept in concepts for name in concept.names for word in (name, *world.words(name))]
    erased = {token for name in names for token in tower.word_ids(name)}
    table = F.normalize(paths.token_table(tower.root).weight.detach().float(), dim=1)
    alike = (table @ table[sorted(erased)].T >= SAME).any(1).tolist()
    forms = {form for name in names for part in (name, *name.split()) for form in numbers(part)}
    return [
        word
        for word, index in tower.words().items()
        if len(word) > 1
        and word.isalpha()
        and word.isascii()
        and not (index in erased or word.lower() in forms or alike[index])
    ]


def vocabulary_prompts(words: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """Make random prompts: words of the vocabulary in the phrasings of objects and styles, some with two words."""
    about_two = ("{} and {}", "a {} in {} style", "a photo of a {} with a {}")
    templates = [*TEMPLATES["object"], *TEMPLATES["style"], *about_two]
    prompts = []
    for _ in range(count):
        template = templates[int(torch.randint(len(templates), (), generator=generator))]
        chosen = [words[int(torch.randint(len(words), (), generator=generator))] for _ in range(template.count("{}"))]
        prompts.append(template.format(*chosen))
    return prompts


@lru_cache(maxsize=8)
def seeded_prompts(words: tuple[str, ...], count: int, seed: int) -> tuple[str, ...]:
    """Give the `vocabulary_prompts` of a seed, cached for text encoders with the same words."""
    return tuple(vocabulary_prompts(words, count, torch.Generator().manual_seed(seed)))


CONTEXTS: dict[str, tuple[str, ...]] = {
    "object": ("a {} in WORD style", "a picture of a {} in WORD style", "a {} and a WORD", "a WORD and a {}",
               "a {} on a WORD background", "a WORD drawing of a {}"),
    "style": ("a WORD in {} style", "a picture of a WORD in {} style", "a {} style drawing of a WORD",
              "a WORD and a WORD in {} style", "a WORD in {} style on a WORD background"),
}  # fmt: skip
"""Phrasings of a concept among other words, by kind; `WORD` is any word."""


def context_prompts(
    tower: TextTower, concept: Concept, words: Sequence[str], count: int, generator: torch.Generator
) -> list[AlignedPrompt]:
    """Make random prompts that name the concept among other words, aligned with the same prompts with its anchor."""
    templates = CONTEXTS["style" if concept.kind == "style" else "object"]

    def draw(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    made = []
    for _ in range(count):
        template = draw(templates)
        while "WORD" in template:
            template = template.replace("WORD", draw(words), 1)
        made.append(align(tower, template, draw(concept.names), concept.anchor or ""))
    return made
