"""Prompts about a concept, aligned with the same prompts about what takes its place, and prompts about the rest."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure import files
from erasure.backbones import Backbone, TextTower
from erasure.concept import TEMPLATES, Concept, key, numbers
from erasure.errors import ConceptError, OptionError
from erasure.interop import paths
from erasure.training.states import Scene
from erasure.world import World

LARGEST_LIST = 64 * 2**20
"""Bytes of a file of prompts."""


class AlignedPrompt(NamedTuple):
    """A prompt with the concept, the same prompt with its anchor, and which token answers to which."""

    prompt: str
    anchor_prompt: str
    start: int
    """Position from which on everything may carry the concept; see `Span.start`."""
    last: int
    """Position of the concept's last token."""
    positions: Tensor
    """For each position of the prompt `(tokens,)` the position of the anchor prompt that takes its place."""


class Span(NamedTuple):
    """Where words stand in a prompt, by token position."""

    first: int
    last: int
    start: int
    """First position that may carry what the words mean: `last`, because attention is causal, but every vector of a
    learned token may."""


def subject_span(tower: TextTower, prompt: str, words: str, ahead: str | None = None) -> Span:
    """The token positions of `words` in `prompt`, all vectors of learned tokens included.

    Args:
        tower: Tokenises them.
        prompt: The whole prompt.
        words: The words that are sought.
        ahead: Text of the prompt ahead of them, which tells several occurrences apart; the last one is taken when
            left out.

    Raises:
        ConceptError: The words are not in the prompt as tokens (cut off, or merged with a neighbour), or not behind
            that text.
    """
    ids = tower.prompt_ids(prompt, truncate=True)
    part = tower.word_ids(words)
    starts = [i for i in range(tower.leading, len(ids) - len(part) + 1) if part and ids[i : i + len(part)] == part]
    if ahead is not None:
        starts = [i for i in starts if i == tower.leading + len(tower.word_ids(ahead.rstrip()))]
    if not starts:
        raise ConceptError(
            f"{words!r} is not found among the tokens of {prompt!r}: is the prompt longer than {tower.max_length} "
            "tokens, or is the word written together with its neighbours?"
        )
    first = starts[-1]
    last = first + len(part) - 1
    learned = tower.learned_ids
    return Span(first, last, next((first + i for i, token in enumerate(part) if token in learned), last))


def align(tower: TextTower, template: str, words: str, anchor: str) -> AlignedPrompt:
    """Align a phrasing of a concept with the same phrasing of its anchor.

    Tokens ahead of the concept stay; the concept's tokens answer to the anchor's last one; tokens after it answer to
    those after the anchor. An empty anchor takes the words out, and the concept answers to the token that follows.
    Concept and anchor are those in the template's place, whatever else of the same name the phrasing holds.
    """
    prompt, ahead = template.format(words), template.partition("{}")[0]
    anchor_prompt = " ".join(template.format(anchor).split())
    first, last, start = subject_span(tower, prompt, words, ahead)
    anchor_last = subject_span(tower, anchor_prompt, anchor, ahead).last if anchor else first
    after = anchor_last + 1 if anchor else first
    positions = torch.arange(tower.max_length)
    positions[first : last + 1] = anchor_last
    positions[last + 1 :] = torch.arange(after, after + tower.max_length - last - 1).clamp(max=tower.max_length - 1)
    return AlignedPrompt(prompt, anchor_prompt, start, last, positions)


def aligned_prompts(tower: TextTower, concept: Concept, default_anchor: str = "") -> list[AlignedPrompt]:
    """All phrasings of a concept, aligned with its anchor.

    Raises:
        ConceptError: The concept has no known token.
    """
    anchor = default_anchor if concept.anchor is None else concept.anchor
    for words in concept.names:
        tower.check_words(words)
    return [align(tower, template, words, anchor) for words in concept.names for template in concept.phrasings()]


def retain_prompts(concepts: Sequence[Concept]) -> list[str]:
    """The empty prompt and every phrasing of the concepts that must survive."""
    prompts = [""]
    for concept in concepts:
        prompts += [template.format(words) for words in concept.retain for template in concept.phrasings()]
    return list(dict.fromkeys(prompts))


SAME = 0.95
"""Cosine of two embeddings from which on no map of the text encoder tells them apart."""


def vocabulary(tower: TextTower, concepts: Sequence[Concept]) -> list[str]:
    """Every whole word that is one token, but for the bare letters and those of the concepts.

    Words of a concept are its names, what else the model's world calls it, and their singulars and plurals; and words
    whose embedding is all but that of one of its tokens, as of a token that was learned from them: what cannot be told
    from the concept cannot be kept when it goes.
    """
    world = World.of(tower.pipe)
    names = [word for concept in concepts for name in concept.names for word in (name, *world.words(name))]
    erased = {token for name in names for token in tower.word_ids(name)}
    table = F.normalize(paths.token_table(tower.root).weight.detach().float(), dim=1)
    alike = (table @ table[sorted(erased)].T >= SAME).any(1).tolist()
    forms = {form for name in names for part in (name, *name.split()) for form in numbers(part)}
    words = []
    for token, index in sorted(tower.tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.removesuffix("</w>")
        if (
            token.endswith("</w>")
            and len(word) > 1
            and word.isalpha()
            and word.isascii()
            and not (index in erased or word.lower() in forms or alike[index])
        ):
            words.append(word)
    return words


def vocabulary_prompts(words: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """Random prompts: words of the vocabulary in the phrasings of objects and styles, some about two of them."""
    about_two = ("{} and {}", "a {} in {} style", "a photo of a {} with a {}")
    templates = [*TEMPLATES["object"], *TEMPLATES["style"], *about_two]
    prompts = []
    for _ in range(count):
        template = templates[int(torch.randint(len(templates), (), generator=generator))]
        chosen = [words[int(torch.randint(len(words), (), generator=generator))] for _ in range(template.count("{}"))]
        prompts.append(template.format(*chosen))
    return prompts


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
    """Random prompts that name the concept among other words, aligned with its anchor in the same company."""
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


def concept_scenes(
    tower: TextTower, concepts: Sequence[Concept], seed: int, contexts: int, *, anchored: bool, scope: bool
) -> list[Scene]:
    """Prompts with concepts to roll out: every phrasing, and random company.

    Args:
        tower: Tokenises them.
        concepts: Which.
        seed: Of the company.
        contexts: Random prompts for each concept.
        anchored: Ask the teacher about the same prompt with the anchor as well ("" where a concept has none).
        scope: And about the prompt without the concept's words, last.
    """
    generator = torch.Generator().manual_seed(seed)
    words = vocabulary(tower, concepts)
    scenes = []
    for concept in concepts:
        pairs = aligned_prompts(tower, concept)
        if words and contexts:
            pairs += context_prompts(tower, concept, words, contexts, generator)
        for pair in pairs:
            asks = [pair.anchor_prompt if concept.anchor else ""] if anchored else []
            asks += [without(pair.prompt, concept)] if scope else []
            scenes.append(Scene(pair.prompt, tuple(asks)))
    return list(dict.fromkeys(scenes))


def retain_scenes(tower: TextTower, concepts: Sequence[Concept], seed: int, count: int) -> list[Scene]:
    """Prompts that must survive: the empty one, those of the retain lists, and `count` random ones."""
    words = vocabulary(tower, concepts)
    generator = torch.Generator().manual_seed(seed + 1)
    random = vocabulary_prompts(words, count, generator) if words else []
    return [Scene(prompt) for prompt in dict.fromkeys([*retain_prompts(concepts), *random])]


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


def without(prompt: str, concept: Concept) -> str:
    """A prompt without the concept's words: every mention of every name, in upper or lower case, as whole words.

    Where a name begins or ends with a letter of a script that writes words without blanks between them, it may stand
    beside other letters.

    Example:
        >>> without("a cartoon of a car", Concept("car"))
        'a cartoon of a'
    """
    for name in sorted(concept.names, key=len, reverse=True):
        words = r"\s+".join(map(re.escape, name.split()))
        pattern = f"{_edge(name[0], '(?<!')}{words}{_edge(name[-1], '(?!')}"
        prompt = re.sub(pattern, " ", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split())


def _edge(letter: str, opening: str) -> str:
    """Part of a pattern that lets no further letter of the same word stand beside a name's first or last one."""
    return rf"{opening}\w)" if re.match(r"\w", letter) and not UNSPACED.match(letter) else ""


UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts without blanks between words: Thai, Lao, Burmese, Khmer, kana and Han."""


def anchor_of(backbone: Backbone, concept: Concept, concepts: Sequence[Concept]) -> Concept | None:
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
