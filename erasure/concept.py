"""What to erase, what takes its place, and what must survive."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from erasure import files
from erasure.errors import ConceptError

Kind = Literal["object", "style", "unsafe"]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}"),
    "style": ("{}", "{} style", "in {} style", "a picture in {} style", "a {} style drawing"),
    "unsafe": ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}"),
}
"""Phrasings that a concept is met in, by kind. `{}` is the concept."""


LONGEST_TEXT = 1000
"""Characters of a concept's name, anchor or template."""


def key(word: str) -> str:
    """A word in the form that words are compared in.

    Case, article, hyphens, underscores, blanks and the ways to write one character make no difference.

    Example:
        >>> key("A Golf_Ball ") == key("golf-ball")
        True
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
    bare = re.sub(r"[\s_\-\u00ad\u2010-\u2015]+", " ", plain).strip()
    return re.sub(r"^(an?|the) (?=\S)", "", bare) or plain


@dataclass(frozen=True)
class Concept:
    """One concept to erase.

    Raises:
        ConceptError: The target is empty, the kind is unknown, a name is in the retain list, a template has not
            exactly one `{}`, or a text is none: no string, too long, or with control characters.

    Example:
        >>> Concept("Van Gogh", kind="style", anchor="painting", retain=("Monet", "Picasso"))
    """

    target: str
    """Words that name the concept, as a prompt would."""
    kind: Kind = "object"
    """`object`, `style`, or `unsafe` (an object whose images reports hide)."""
    anchor: str | None = None
    """What prompts with the concept should mean instead; `None` leaves the choice to the strategy."""
    retain: tuple[str, ...] = ()
    """Concepts that must survive, for instance near neighbours."""
    synonyms: tuple[str, ...] = ()
    """Other words for the concept, erased along with it."""
    templates: tuple[str, ...] = ()
    """Phrasings with one `{}` each; those of the kind when empty."""

    def __post_init__(self) -> None:
        """Check the fields, and take a single word for a list of one."""
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
        if not self.target:
            raise ConceptError("the concept is empty: name what to erase, for instance 'Van Gogh'")
        if self.kind not in get_args(Kind):
            raise ConceptError(
                f"unknown kind {self.kind!r} of concept {self.target!r}; allowed: {', '.join(get_args(Kind))}"
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
        """All that the concept says in words: its prompts, its anchor, and what must survive."""
        return [*self.prompts(), *([self.anchor] if self.anchor else []), *self.retain]

    def to_dict(self) -> dict[str, object]:
        """Plain data for the artifact's config."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Concept:
        """The inverse of `to_dict`; fields that a newer version added are left out.

        Raises:
            ConceptError: It has no target, or see the class.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or "target" not in data:
            raise ConceptError(f"a concept is {data!r:.80}, expected fields with a 'target' among them")
        return cls(**{key: value for key, value in data.items() if key in known})


def _check_text(text: object) -> None:
    """Raise `ConceptError` for what cannot be part of a prompt."""
    if not isinstance(text, str):
        raise ConceptError(f"{text!r:.80} in a concept is no text")
    if len(text) > LONGEST_TEXT:
        raise ConceptError(f"a text of {len(text)} characters in a concept, at most {LONGEST_TEXT} are allowed")
    if not files.is_line(text):
        raise ConceptError(f"{text!r:.80} in a concept holds control characters or line breaks: take them out")


def as_concepts(concepts: str | Concept | Sequence[str | Concept]) -> list[Concept]:
    """One or several concepts, given as words or as `Concept`, as a list.

    Raises:
        ConceptError: There is none, or one is given twice.
    """
    given = [concepts] if isinstance(concepts, (str, Concept)) else list(concepts)
    made = [item if isinstance(item, Concept) else Concept(item) for item in given]
    targets = [key(concept.target) for concept in made]
    if not made:
        raise ConceptError("no concept given: name at least one, for instance 'Van Gogh'")
    if len(set(targets)) < len(targets):
        raise ConceptError(f"a concept is given twice: {', '.join(targets)}")
    return made
