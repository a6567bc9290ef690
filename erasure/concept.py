"""Concepts: what to erase, its anchor (what to draw instead), and what must survive."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from erasure import files
from erasure.errors import ConceptError, ConceptWarning
from erasure.files import shown

Kind = Literal["object", "style", "unsafe"]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}"),
    "style": ("{}", "{} style", "in {} style", "a picture in {} style", "a {} style drawing"),
    "unsafe": ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}"),
}
"""Prompt templates of concepts, by kind. `{}` is the concept."""


PLACEHOLDER = re.compile(r"<[^<>\s]+>")
"""Pattern of the usual names of learned tokens."""
MOST_CONCEPTS = 10_000
"""Largest number of concepts of one erasure."""
LONGEST_TEXT = 1000
"""Largest number of characters of a concept's name, anchor or template."""
UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
"""Zero-width characters that words from web pages and files may contain: soft hyphens, joiners, byte order marks."""


def key(word: str) -> str:
    """Normalise a word for comparison.

    Case, articles, hyphens, underscores, spaces and equivalent Unicode forms make no difference.

    Example:
        >>> key("A Golf_Ball ") == key("golf-ball")
        True
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word.translate(UNSEEN)).casefold())
    bare = re.sub(r"[\s_\-\u2010-\u2015]+", " ", plain).strip()
    return re.sub(r"^(an?|the) (?=\S)", "", bare) or plain


def singulars(word: str) -> Iterator[str]:
    """Yield a word normalised by `key`, and then its possible singular forms."""
    yield word
    for ending, others in (("ies", ("y",)), ("ves", ("f", "fe")), ("es", ("",)), ("s", ("",))):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            yield from (word.removesuffix(ending) + other for other in others)


def numbers(word: str) -> set[str]:
    """Give a word normalised by `key`, with its possible singular and plural forms."""
    word = key(word)
    plurals = {f"{word}s", f"{word}es", re.sub("y$", "ies", word), re.sub("fe?$", "ves", word)}
    return {*singulars(word), *plurals}


@dataclass(frozen=True)
class Concept:
    """One concept to erase.

    Raises:
        ConceptError: The target or a synonym is empty, the kind is unknown, a name is in the retain list or is the
            anchor, a template does not have exactly one `{}`, or a text is not a string, is too long, or has control
            characters.

    Example:
        >>> Concept("Van Gogh", kind="style", anchor="painting", retain=("Monet", "Picasso"))
    """

    target: str
    """Name of the concept, as in a prompt."""
    kind: Kind = "object"
    """`object`, `style`, or `unsafe` (an object whose images reports hide)."""
    anchor: str | None = None
    """Anchor: what prompts with the concept should show instead; `None` leaves the choice to the strategy."""
    retain: tuple[str, ...] = ()
    """Retain list: names of concepts that must survive, for instance similar ones."""
    synonyms: tuple[str, ...] = ()
    """Other names of the concept, which are erased too."""
    templates: tuple[str, ...] = ()
    """Prompt templates with one `{}` each; those of the kind when empty."""

    def __post_init__(self) -> None:
        """Check the fields, and accept a single word for a list of one."""
        for field in ("retain", "synonyms", "templates"):
            value = getattr(self, field)
            if not isinstance(value, (str, Iterable)):
                raise ConceptError(f"{field} is {value!r:.80}, allowed: a list of texts")
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        anchor = () if self.anchor is None else (self.anchor,)
        if isinstance(self.target, str):
            object.__setattr__(self, "target", self.target.strip())
        for text in (self.target, *anchor, *self.retain, *self.synonyms, *self.templates):
            _check_text(text)
        object.__setattr__(self, "target", _tidy(self.target))
        object.__setattr__(self, "anchor", None if self.anchor is None else _tidy(self.anchor))
        object.__setattr__(self, "retain", tuple(map(_tidy, self.retain)))
        object.__setattr__(self, "synonyms", tuple(map(_tidy, self.synonyms)))
        if not self.target:
            raise ConceptError("the concept is empty: name what to erase, for instance 'Van Gogh'")
        if self.kind not in get_args(Kind):
            raise ConceptError(
                f"unknown kind {self.kind!r} of concept {self.target!r}; allowed: {', '.join(get_args(Kind))}"
            )
        if not all(self.synonyms):
            raise ConceptError(f"a synonym of {self.target!r} is empty: write a word, or leave it out")
        if self.anchor and (same := same_word(self.anchor, self.names)):
            raise ConceptError(
                f"the anchor {self.anchor!r} of {self.target!r} is what is to be erased ({same!r}), so nothing would "
                "change: name what shall take its place, or '' for nothing"
            )
        clash = {key(word) for word in self.names} & {key(word) for word in self.retain}
        if clash:
            raise ConceptError(f"{sorted(clash)} is to be erased and retained at once: take it off one of the lists")
        for template in self.templates:
            if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
                raise ConceptError(f"template {template!r} needs exactly one {{}} where the concept goes")

    @property
    def names(self) -> tuple[str, ...]:
        """The target and its synonyms."""
        return (self.target, *self.synonyms)

    def phrasings(self) -> tuple[str, ...]:
        """The templates in use."""
        return self.templates or TEMPLATES[self.kind]

    def prompts(self) -> list[str]:
        """Every phrasing of every name."""
        return [template.format(name) for name in self.names for template in self.phrasings()]

    def texts(self) -> list[str]:
        """List all texts of the concept: its prompts, its anchor, and its retain list."""
        return [*self.prompts(), *([self.anchor] if self.anchor else []), *self.retain]

    def to_dict(self) -> dict[str, object]:
        """Convert to plain data for the erasure's config."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Concept:
        """Read a concept from the data of `to_dict`; unknown fields of newer versions are left out.

        Raises:
            ConceptError: There is no target, or the data are invalid as for the class.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or "target" not in data:
            raise ConceptError(f"a concept is {data!r:.80}, expected fields with a 'target' among them")
        return cls(**{key: value for key, value in data.items() if key in known})


def same_word(word: str, others: Iterable[str]) -> str | None:
    """Find the first of some words that equals a word, or is its plural or singular."""
    own = numbers(word)
    return next((other for other in others if key(other) in own), None)


def _tidy(text: str) -> str:
    """Normalise a text for tokenisers: composed characters, single spaces, no zero-width characters."""
    return " ".join(unicodedata.normalize("NFC", text.translate(UNSEEN)).split())


def _check_text(text: object) -> None:
    """Raise `ConceptError` for a text that cannot be part of a prompt."""
    if not isinstance(text, str):
        raise ConceptError(f"{text!r:.80} in a concept is no text")
    if len(text) > LONGEST_TEXT:
        raise ConceptError(
            f"a text of {len(text)} characters in a concept, at most {LONGEST_TEXT} are allowed: shorten it"
        )
    if not files.is_line(text):
        raise ConceptError(f"{text!r:.80} in a concept holds control characters or line breaks: take them out")


T = TypeVar("T")


def listed(given: T | Iterable[T], kinds: tuple[type[T], ...]) -> list[T]:
    """Make a list of one or several texts or concepts.

    Args:
        given: One of them, or several.
        kinds: What each may be.

    Raises:
        ConceptError: Something else is given, such as a table of anchors, whose values would be lost.
    """
    if isinstance(given, kinds):
        return [given]
    if isinstance(given, (Mapping, bytes)) or not isinstance(given, Iterable):
        raise ConceptError(
            f"{shown(given)} names no concept: give a text such as 'Van Gogh', or 'cat>dog' for a cat in whose place "
            "there will be a dog, a Concept, or a list of these"
        )
    every = list(given)
    if wrong := [item for item in every if not isinstance(item, kinds)]:
        raise ConceptError(f"{shown(wrong[0])} in a list of concepts is no text and no Concept")
    return every


def as_concepts(concepts: str | Concept | Sequence[str | Concept]) -> list[Concept]:
    """Make a list of one or several concepts; a word becomes an object without anchor.

    `erasure.world.World.concepts` instead gives words their meaning for a model.

    Raises:
        ConceptError: There is no concept, one is given twice, or one is both erased and retained.
    """
    given: list[str | Concept] = listed(concepts, (str, Concept))
    if len(given) > MOST_CONCEPTS:
        raise ConceptError(
            f"an erasure of {len(given):,} concepts, at most {MOST_CONCEPTS:,} are allowed: make several"
        )
    made = [item if isinstance(item, Concept) else Concept(item) for item in given]
    if not made:
        raise ConceptError("no concept given: name at least one, for instance 'Van Gogh'")
    targets = Counter(key(concept.target) for concept in made)
    if twice := [concept.target for concept in made if targets[key(concept.target)] > 1]:
        raise ConceptError(f"a concept is given twice: {', '.join(twice)}")
    erased = {key(name): concept.target for concept in made for name in concept.names}
    for concept in made:
        if clash := [erased[key(word)] for word in concept.retain if key(word) in erased]:
            raise ConceptError(
                f"{clash[0]!r} is to be erased, and retained by {concept.target!r}, in one erasure: "
                "take it off that list, or make two erasures"
            )
        forms = ((word, erased[form]) for word in concept.retain for form in sorted(numbers(word)) if form in erased)
        if kept := next(forms, None):
            warnings.warn(
                f"{kept[0]!r}, which {concept.target!r} retains, may be another form of {kept[1]!r}, which is erased, "
                "and then works against it: take it off the retain list unless it means something else",
                ConceptWarning,
                stacklevel=2,
            )
        if concept.anchor and (also := [erased[form] for form in numbers(concept.anchor) if form in erased]):
            warnings.warn(
                f"the anchor {concept.anchor!r} of {concept.target!r} is erased too ({also[0]!r}), so that "
                f"prompts about {concept.target!r} may show it: choose an anchor that stays",
                ConceptWarning,
                stacklevel=2,
            )
    return made
