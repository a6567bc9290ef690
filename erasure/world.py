"""What words mean to a model: which kind a concept is, what takes its place, what must survive, its other names.

Everybody asks here: the functions, the command line, the evaluation and what builds the embedded models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from erasure.concept import Concept, Kind, as_concepts, key
from erasure.errors import ConceptError

if TYPE_CHECKING:
    from erasure.assets.facts import CanvasFacts

Value = TypeVar("Value")
ALL_UNSAFE = ("unsafe", "unsafe content")
"""Words for all unsafe objects of a world."""


class Classes(NamedTuple):
    """What a word names in a world."""

    domain: Literal["object", "style"]
    """Which of the judge's classifiers knows them."""
    members: tuple[str, ...]
    """One class, or those of a group."""


@dataclass(frozen=True)
class World:
    """The words that a model declares in a `canvas.json` beside its files.

    A model that declares none, such as Stable Diffusion, has an empty world: a word is an object without anchor there,
    unless the user says otherwise. Words are looked up without regard to case, articles, number, hyphens and
    underscores.

    Example:
        >>> World.of(pipe).concept("ink")
        Concept(target='ink', kind='style', anchor='contour', ...)
    """

    objects: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()
    """Objects that stand in for unsafe content."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Objects of each group."""
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other words for an object."""
    anchors: Mapping[str, str] = field(default_factory=dict)
    """What takes the place of an object or style."""
    retain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What must survive the erasure of an object or style."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call that the model was made for."""

    @classmethod
    def of(cls, pipe: object) -> World:
        """The world of a pipeline's model, found where the pipeline was loaded from.

        Raises:
            ArtifactError: Its `canvas.json` is damaged.
        """
        return cls.at(getattr(pipe, "name_or_path", None) or "")

    @classmethod
    def at(cls, model: str | Path) -> World:
        """The world of a model's folder, or of an embedded model by its name; empty for a repository of the Hub.

        Raises:
            ArtifactError: Its `canvas.json` is damaged.
        """
        from erasure import assets

        return cls.from_facts(assets.facts_of(model))

    @classmethod
    def from_facts(cls, facts: CanvasFacts) -> World:
        """The world that the content of a `canvas.json` describes."""
        groups: dict[str, tuple[str, ...]] = {}
        for name, value in facts.get("groups", {}).items():
            if isinstance(value, str):  # the group of an object
                groups[value] = (*groups.get(value, ()), name)
            else:  # the objects of a group
                groups[name] = tuple(value)
        return cls(
            objects=tuple(facts.get("objects", ())),
            styles=tuple(facts.get("styles", ())),
            unsafe=tuple(facts.get("unsafe", ())),
            groups=groups,
            synonyms={name: tuple(words) for name, words in facts.get("synonyms", {}).items()},
            anchors=dict(facts.get("anchors", {})),
            retain={name: tuple(words) for name, words in facts.get("retain", {}).items()},
            generation=dict(facts.get("generation", {})),
        )

    @property
    def declared(self) -> bool:
        """Whether the model declares any object or style."""
        return bool(self.objects or self.styles)

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps that the model was made for."""
        return int(self.generation.get("num_inference_steps", 20))

    @property
    def guidance_scale(self) -> float:
        """Guidance that the model was made for."""
        return float(self.generation.get("guidance_scale", 3.0))

    @property
    def side(self) -> int:
        """Side of an image in pixels that the model was made for."""
        return int(self.generation.get("height", 64))

    # Words --------------------------------------------------------------------------------------------------------

    def find(self, word: str, kind: Kind | None = None) -> Classes | None:
        """The classes that a word stands for; `None` where the world has no such object, style, group or synonym.

        Args:
            word: A name, in any case and number, with or without article.
            kind: Decides where the world has an object and a style of that name.
        """
        objects: dict[str, tuple[str, ...]] = {
            **dict(self.groups),
            **({name: self.unsafe for name in ALL_UNSAFE} if self.unsafe else {}),
            **{other: (name,) for name, others in self.synonyms.items() for other in others},
            **{name: (name,) for name in self.objects},
        }
        styles = {name: (name,) for name in self.styles}
        for form in _forms(key(word)):
            object_, style = _lookup(objects, form), _lookup(styles, form.removesuffix(" style"))
            if style and (kind == "style" or not object_):
                return Classes("style", style)
            if object_:
                return Classes("object", object_)
        return None

    def kind(self, word: str) -> Kind:
        """What kind of concept a word is: as the world lists it, and an object elsewhere."""
        found = self.find(word)
        if found is None or found.domain == "object":
            return "unsafe" if found and set(found.members) <= set(self.unsafe) else "object"
        return "style"

    def anchor(self, word: str, erased: Sequence[str] = ()) -> str | None:
        """What the world suggests in place of a word, passing over what is erased as well; `None` elsewhere."""
        chosen, seen = self.anchors.get(word), {word}
        while chosen is not None and chosen in erased and chosen not in seen:
            seen.add(chosen)
            chosen = self.anchors.get(chosen)
        return None if chosen in erased else chosen

    # Concepts -----------------------------------------------------------------------------------------------------

    def concept(self, word: str) -> Concept:
        """The concept of a word; see `concepts`.

        Raises:
            ConceptError: The word stands for several: it names a group.
        """
        made = self.concepts(word)
        if len(made) > 1:
            names = ", ".join(concept.target for concept in made)
            raise ConceptError(f"{word!r} stands for several concepts ({names}): name one of them")
        return made[0]

    def concepts(
        self,
        given: str | Concept | Sequence[str | Concept],
        *,
        kind: Kind | None = None,
        anchor: str | None = None,
        retain: Sequence[str] = (),
        synonyms: Sequence[str] = (),
    ) -> list[Concept]:
        """The concepts that words stand for; a `Concept` among them is taken as it stands.

        Args:
            given: One or several. A group stands for all of its members.
            kind: What the words are; what the world says when left out.
            anchor: What takes their place ("" for nothing); what the world suggests when left out.
            retain: What must survive.
            synonyms: Other words for the concept, erased along with it.

        Raises:
            ConceptError: None is given, one is given twice, or they contradict each other.
        """
        items = [given] if isinstance(given, (str, Concept)) else list(given)
        expanded = [part for item in items for part in (self._members(item) if isinstance(item, str) else [item])]
        words = [item for item in expanded if isinstance(item, str)]
        return as_concepts(
            [
                item
                if isinstance(item, Concept)
                else Concept(
                    item,
                    kind=kind or self.kind(item),
                    anchor=self.anchor(item, words) if anchor is None else anchor,
                    retain=tuple(retain) or self.retain.get(item, ()),
                    synonyms=tuple(synonyms),
                )
                for item in expanded
            ]
        )

    def _members(self, word: str) -> tuple[str, ...]:
        """A word in the world's own spelling, or the members of the group that it names."""
        found = self.find(word)
        return (word,) if found is None else found.members


def _forms(word: str) -> Iterator[str]:
    """A word as it is, then what it may be the plural of."""
    yield word
    for ending, singulars in (("ies", ("y",)), ("ves", ("f", "fe")), ("es", ("",)), ("s", ("",))):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            yield from (word.removesuffix(ending) + singular for singular in singulars)


def _lookup(names: Mapping[str, Value], word: str) -> Value | None:
    """The value of the first name that is the word in some spelling."""
    return next((value for name, value in names.items() if key(name) == word), None)
