"""Prompts that mean the concept in other words: misspelled, synonyms, in other languages, from lists of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from pydantic import JsonValue

from erasure.backbones import Backbone
from erasure.concept import numbers
from erasure.errors import EvaluationError
from erasure.eval.attacks import Access, Attack, ControlledAttack, SkippedPromptError, register
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample, sample_seed
from erasure.files import at_home, lines_of, read_lines, read_table, read_text, shown
from erasure.files.tables import SEPARATORS
from erasure.options import Count, PathText
from erasure.world import World

LIMIT = 2**24
"""Bytes of a file of rewrites."""
COLUMNS = ("rewrite", "word", "prompt")
"""What a file says of each: what is written, and in the place of which word, or of which whole prompt."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Rewrite(NamedTuple):
    """One way to write something differently."""

    rewrite: str
    word: str | None = None
    """What it takes the place of; the concept's own words where neither is said."""
    prompt: str | None = None
    """The whole prompt that it takes the place of."""

    def of(self, prompt: str, names: Sequence[str]) -> str | None:
        """A prompt rewritten; `None` where there is nothing to rewrite."""
        if self.prompt is not None:
            return self.rewrite if self.prompt.strip() == prompt.strip() else None
        found = place_of(prompt, names if self.word is None else [self.word])
        return None if found is None else prompt[: found.start()] + self.rewrite + prompt[found.end() :]


def place_of(prompt: str, names: Sequence[str]) -> re.Match[str] | None:
    """Where a prompt first names something, in singular or plural, whole words only."""
    forms = sorted({form for name in names for form in (name.lower(), *numbers(name))}, key=len, reverse=True)
    return re.search(r"\b(?:" + "|".join(map(re.escape, forms)) + r")\b", prompt, re.IGNORECASE)


def read_rewrites(path: str | Path) -> list[Rewrite]:
    """The rewrites of a file: CSV, TSV or JSON lines with `rewrite`, and `word` or `prompt`; or a text, one a line.

    Raises:
        EvaluationError: It cannot be read, has other columns, an empty or repeated row, or none.
    """
    file = at_home(path)
    ending = file.suffix.lower()
    rows: list[tuple[int, Mapping[str, JsonValue]]]
    if ending == ".jsonl":
        lines: Iterator[dict[str, JsonValue]] = read_lines(file, dict[str, JsonValue], error=EvaluationError)
        rows = list(enumerate(lines, 1))
    else:
        text = read_text(file, LIMIT, error=EvaluationError)
        if ending in SEPARATORS:
            columns, cells = read_table(text, str(file), SEPARATORS[ending], error=EvaluationError)
            if "rewrite" not in columns:
                raise EvaluationError(
                    f"{file} has the columns {shown(columns)}; expected: rewrite, and word or prompt where it does "
                    "not take the place of the concept's own word"
                )
            rows = list(cells)
        else:
            rows = [(number, {"rewrite": line}) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    made: list[Rewrite] = []
    for number, row in rows:
        where = f"{file}, line {number}"
        if unknown := [name for name in row if name not in COLUMNS]:
            raise EvaluationError(f"{where} has {shown(unknown[0])}; allowed: {', '.join(COLUMNS)}")
        if wrong := [name for name, value in row.items() if not isinstance(value, str | None)]:
            raise EvaluationError(f"{where}: {wrong[0]} is {shown(row[wrong[0]])}; expected a text")
        texts = {name: str(value).strip() for name, value in row.items() if value}
        if not texts.get("rewrite"):
            raise EvaluationError(f"{where} has no rewrite: write one, or delete the line")
        if "word" in texts and "prompt" in texts:
            raise EvaluationError(f"{where} has both word and prompt: what it takes the place of is one of them")
        one = Rewrite(texts["rewrite"], texts.get("word"), texts.get("prompt"))
        if one in made:
            raise EvaluationError(f"{where} says the same as line {rows[made.index(one)][0]}: delete one of them")
        made.append(one)
    if not made:
        raise EvaluationError(f"{file} holds no rewrites: write one on each line")
    return made


def rewritten(victim: Victim, sample: Sample, rewrites: Sequence[Rewrite], count: int, what: str) -> Iterator[Attempt]:
    """What is tried of some rewrites of a prompt, each text once.

    Raises:
        SkippedPromptError: None is of this prompt.
    """
    names = [victim.target.name, *victim.target.words]
    texts = [text for one in rewrites if (text := one.of(sample.prompt, names)) is not None]
    if not texts:
        raise SkippedPromptError(f"no {what} rewrites {sample.prompt!r}: it has none of the words that they are for")
    for text in list(dict.fromkeys(texts))[:count]:
        cut = any(len(tower.prompt_ids(text)) > tower.max_length for tower in victim.backbone.towers)
        yield Attempt({"prompt": text}, cut=cut)


@register("typo")
@dataclass(frozen=True, kw_only=True)
class Typo(ControlledAttack):
    """Misspell the concept: two neighbouring letters swapped, one left out, one doubled, one taken for another.

    Words of a file are tried first. The control misspells other words of the prompt by the same rule.
    """

    title: ClassVar[str] = "the concept misspelled, by rule or from a list"
    paper: ClassVar[str] = "a way that users write"
    access: ClassVar[Access] = "prompt"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "texts": 2},
        "quick": {"samples": 10, "texts": 8},
        "full": {},
    }

    texts: Count = 20
    """Texts that are tried for each prompt."""
    typos: Count = 1
    """Slips in each text."""
    file: PathText = ""
    """A list of misspellings (CSV, TSV or JSON lines with `rewrite`, and `word` or `prompt`; or one on each line)."""

    @property
    def tries(self) -> int:
        """One for each text."""
        return self.texts

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        names = [victim.target.name, *victim.target.words]
        own = place_of(sample.prompt, names)
        if self.control:
            inside = range(own.start(), own.end()) if own else range(0)
            words = [each for each in re.finditer(r"\w{3,}", sample.prompt) if each.start() not in inside]
        else:
            words = [own] if own else []
        listed = read_rewrites(self.file) if self.file and not self.control else []
        generator = torch.Generator().manual_seed(sample_seed(sample.seed, f"typos: {sample.prompt}", self.typos))
        made = [Rewrite(text, prompt=sample.prompt) for text in self.misspelled(sample.prompt, words, generator)]
        yield from rewritten(victim, sample, [*listed, *made], self.texts, "misspelling")

    def misspelled(self, prompt: str, words: Sequence[re.Match[str]], generator: torch.Generator) -> Iterator[str]:
        """Texts with slips in one of some words of a prompt, twice as many as are wanted: some are alike."""
        for _ in range(2 * self.texts if words else 0):
            word = words[int(torch.randint(len(words), (), generator=generator))]
            text = word.group()
            for _ in range(self.typos):
                text = slip(text, generator)
            if text != word.group():
                yield prompt[: word.start()] + text + prompt[word.end() :]


def slip(word: str, generator: torch.Generator) -> str:
    """A word with one slip: letters swapped, one left out, one doubled, or one taken for another."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    kind, place = draw(4), draw(len(word))
    if kind == 0 and len(word) > 1:
        place = draw(len(word) - 1)
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 1 and len(word) > 1:
        return word[:place] + word[place + 1 :]
    if kind == 2:
        return word[: place + 1] + word[place:]
    return word[:place] + LETTERS[draw(len(LETTERS))] + word[place + 1 :]


@dataclass(frozen=True, kw_only=True)
class Listed(Attack):
    """Rewrites of a list, each tried as it stands."""

    access: ClassVar[Access] = "prompt"
    paper: ClassVar[str] = "a way that users write"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "texts": 2},
        "quick": {"samples": 10, "texts": 10},
        "full": {},
    }

    texts: Count = 50
    """Texts that are tried for each prompt at most."""
    file: PathText = ""
    """The list (CSV, TSV or JSON lines with `rewrite`, and `word` or `prompt`; or one on each line)."""

    @property
    def tries(self) -> int:
        """One for each text."""
        return self.texts


@register("synonym")
@dataclass(frozen=True, kw_only=True)
class Synonym(Listed):
    """Write synonyms and descriptions of the concept in its place.

    From a file; without one, what the model's world calls the concept besides. An erasure is told synonyms as well, so
    what comes through are words that nobody told it of. Nothing is drawn at random, so there is no chance level.
    """

    title: ClassVar[str] = "synonyms of the concept, from a list or the model's world"

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        if self.file:
            rewrites = read_rewrites(self.file)
        else:
            world = World.of(victim.pipe)
            names = {victim.target.name, *victim.target.words}
            words = [word for name in sorted(names) for word in world.words(name) if word not in names]
            rewrites = [Rewrite(word) for word in dict.fromkeys(words)]
            if not rewrites:
                raise SkippedPromptError(
                    f"the model's world has no other words for {victim.target.name!r}: name a list (file)"
                )
        yield from rewritten(victim, sample, rewrites, self.texts, "synonym")


@register("translation")
@dataclass(frozen=True, kw_only=True)
class Translation(Listed):
    """Write the concept, or the whole prompt, in other languages, from a file.

    Nothing is drawn at random, so there is no chance level.
    """

    title: ClassVar[str] = "the concept in other languages, from a list"

    def lacks(self, backbone: Backbone) -> str:
        """See `Attack.lacks`."""
        return "" if self.file else "it needs a list of translations: name its file (file)"

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        yield from rewritten(victim, sample, read_rewrites(self.file), self.texts, "translation")
