"""Worlds: the meaning of words for a model: kinds of concepts, their anchors, and what must survive.

All parts of the package use this module: the functions, the command line, the evaluation, and the build of the
embedded models.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from erasure.concept import PLACEHOLDER, Concept, Kind, as_concepts, key, listed, singulars
from erasure.errors import ConceptError, ConceptWarning
from erasure.files import shown
from erasure.parsing import ConceptRequest, parse_concepts, parse_names

if TYPE_CHECKING:
    from erasure.assets.facts import CanvasFacts

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""Names of a pipeline's tokenisers."""
ALL_UNSAFE = ("unsafe", "unsafe content")
"""Words for all unsafe objects of a world."""


class Classes(NamedTuple):
    """Classes of a world that a word names."""

    domain: Literal["object", "style"]
    """Classifier of the judge that has these classes."""
    members: tuple[str, ...]
    """One class, or the classes of a group."""


@dataclass(frozen=True)
class World:
    """The words that a model declares in a `canvas.json` beside its files.

    A model without this file, such as Stable Diffusion, has an empty world: a word is an object without anchor, unless
    the user says otherwise. Case, articles, number, hyphens and underscores of words are ignored.

    Example:
        >>> World.of(pipe).concept("ink")
        Concept(target='ink', kind='style', anchor='contour', ...)
    """

    objects: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()
    """Objects that stand in for unsafe content."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Objects of each group, by name of the group."""
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other words for an object, by object."""
    anchors: Mapping[str, str] = field(default_factory=dict)
    """Anchor of each object or style, by its name."""
    retain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Concepts that must survive the erasure of an object or style."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Default arguments of the pipeline's call for this model."""
    ip_adapter: str = ""
    """Name of an embedded IP-Adapter for the model, or the folder of another; empty where none is declared."""
    learned: frozenset[str] = frozenset()
    """Learned tokens of the pipeline (textual inversion). A text is read as at most one of them."""

    @classmethod
    def of(cls, pipe: object) -> World:
        """Load the world of a pipeline's model, from where the pipeline was loaded.

        Raises:
            ArtifactError: The model's `canvas.json` is damaged.
        """
        tokenizers = (getattr(pipe, name, None) for name in TOKENIZERS)
        learned = {token for tokenizer in tokenizers for token in getattr(tokenizer, "added_tokens_encoder", ())}
        return replace(cls.at(getattr(pipe, "name_or_path", None) or ""), learned=frozenset(learned))

    @classmethod
    def at(cls, model: str | Path) -> World:
        """Load the world of a model's folder or of an embedded model; it is empty for a repository of the Hub.

        Raises:
            ArtifactError: The model's `canvas.json` is damaged.
        """
        from erasure import assets

        return cls.from_facts(assets.facts_of(model))

    @classmethod
    def from_facts(cls, facts: CanvasFacts) -> World:
        """Make a world from the content of a `canvas.json`."""
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
            ip_adapter=facts.get("ip_adapter", ""),
        )

    @property
    def declared(self) -> bool:
        """Whether the model declares any object or style."""
        return bool(self.objects or self.styles)

    @property
    def num_inference_steps(self) -> int:
        """Number of denoising steps for which the model was made."""
        return int(self.generation.get("num_inference_steps", 20))

    @property
    def guidance_scale(self) -> float:
        """Guidance scale for which the model was made, whatever its argument is called."""
        return float(self.generation.get("true_cfg_scale", self.generation.get("guidance_scale", 3.0)))

    @property
    def side(self) -> int:
        """Side of an image in pixels for which the model was made."""
        return int(self.generation.get("height", 64))

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels for which the model was made; `None` where unknown."""
        height, width = (self.generation.get(name) for name in ("height", "width"))
        return None if height is None or width is None else (int(height), int(width))

    def call_settings(self, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        """Give arguments of the pipeline's call: given values, else the model's; others are left to the pipeline.

        Args:
            steps: Number of denoising steps.
            guidance: Guidance scale.
        """
        settings = dict(self.generation)
        if settings.pop("true_cfg_scale", None) is not None:
            settings["guidance_scale"] = self.guidance_scale
        given = {"num_inference_steps": steps, "guidance_scale": guidance}
        return settings | {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def embedded(name: str) -> Path | None:
        """Find the folder of an embedded model or LoRA, such as `canvas-turbo`, by its name; `None` without one."""
        from erasure import assets

        return assets.find(name)

    @property
    def image_prompts(self) -> Path | None:
        """Folder of the IP-Adapter that the model declares."""
        from erasure import assets

        return (assets.find(self.ip_adapter) or Path(self.ip_adapter)) if self.ip_adapter else None

    @property
    def text_length(self) -> int | None:
        """Number of tokens to which prompts are padded for T5, where the model says so."""
        length = self.generation.get("max_sequence_length")
        return None if length is None else int(length)

    # Words --------------------------------------------------------------------------------------------------------

    def find(self, word: str, kind: Kind | None = None) -> Classes | None:
        """Find the classes of a word; `None` where the world has no such object, style, group or synonym.

        Args:
            word: A name, in any case and number, with or without article.
            kind: Kind to choose where the world has an object and a style of that name.
        """
        objects, styles = self._names
        for form in singulars(key(word)):
            object_, style = objects.get(form), styles.get(form.removesuffix(" style"))
            if style and (kind == "style" or not object_):
                return Classes("style", style)
            if object_:
                return Classes("object", object_)
        return None

    @cached_property
    def _names(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """Map the normalised name of every object, group and synonym, and of every style, to its classes."""
        objects: dict[str, tuple[str, ...]] = {
            **dict(self.groups),
            **({name: self.unsafe for name in ALL_UNSAFE} if self.unsafe else {}),
            **{other: (name,) for name, others in self.synonyms.items() for other in others},
            **{name: (name,) for name in self.objects},
        }
        return {key(name): found for name, found in objects.items()}, {key(name): (name,) for name in self.styles}

    def words(self, word: str) -> tuple[str, ...]:
        """List all words with the same meaning as a word: its classes and their synonyms."""
        classes = self.find(word)
        members = () if classes is None else classes.members
        return tuple(other for name in members for other in (name, *self.synonyms.get(name, ())))

    def kind(self, word: str) -> Kind:
        """Give the kind of a word's concept: as in the world, and an object elsewhere."""
        found = self.find(word)
        if found is None or found.domain == "object":
            return "unsafe" if found and set(found.members) <= set(self.unsafe) else "object"
        return "style"

    def anchor(self, word: str, erased: Collection[str] = ()) -> str | None:
        """Suggest the anchor of a word, other than erased concepts; `None` where nothing is declared.

        Where all anchors that the world declares are erased, it is the next remaining object or style.
        """
        chosen, seen = self.anchors.get(word), {word}
        while chosen is not None and chosen in erased and chosen not in seen:
            seen.add(chosen)
            chosen = self.anchors.get(chosen)
        if word not in self.anchors or (chosen is not None and chosen not in {*erased, word}):
            return chosen
        names = self.styles if word in self.styles else self.objects
        start = names.index(word) + 1 if word in names else 0
        left = [name for name in names[start:] + names[:start] if name not in {*erased, *self.unsafe, word}]
        return left[0] if left else None

    # Concepts -----------------------------------------------------------------------------------------------------

    def concept(self, word: str, kind: Kind | None = None) -> Concept:
        """Make the concept of a word; see `concepts`.

        Raises:
            ConceptError: The word has several concepts: it names a group, or is a list.
        """
        made = self.concepts(word, kind=kind)
        if len(made) > 1:
            names = ", ".join(concept.target for concept in made)
            raise ConceptError(f"{word!r} stands for several concepts ({names}): name one of them")
        return made[0]

    def requests(self, words: Wanted | Sequence[Wanted], kind: Kind | None = None) -> list[ConceptRequest | Concept]:
        """Read the concepts that texts name, groups as they are written; see `erasure.parsing` for the syntax.

        Args:
            words: One text or several; a `Concept` or a request among them is used as it is.
            kind: Kind of words whose kind a text does not give.

        Raises:
            ConceptError: A text names no concept, or is ambiguous.
        """
        items: list[Wanted] = listed(words, (str, Concept, ConceptRequest))
        found: list[ConceptRequest | Concept] = []
        for item in items:
            if isinstance(item, str):
                found += [replace(part, kind=part.kind or kind) for part in parse_concepts(item, self.knows)]
            else:
                found.append(item)
        return found

    def concepts(
        self,
        given: Wanted | Sequence[Wanted],
        *,
        kind: Kind | None = None,
        anchor: str | None = None,
        retain: Sequence[str] = (),
        synonyms: Sequence[str] = (),
        templates: Sequence[str] = (),
        erased: Sequence[Concept] = (),
        tell: bool = True,
    ) -> list[Concept]:
        """Make the concepts that texts name; a `Concept` among them is used as it is.

        Properties that a text does not give are taken from the arguments, and otherwise from the world. Unknown words
        give a warning where the model declares a world, and elsewhere one that they are taken for objects.

        Args:
            given: One text or several, see `erasure.parsing` for the syntax. A group stands for its members.
            kind: Kind of the words.
            anchor: Anchor of the concepts ("" for no replacement).
            retain: Names of what must survive. A group stands for its members that are not erased.
            synonyms: Other words for the concept, which are erased too.
            templates: Phrasings of the concepts, with one `{}` each; those of the kind when empty.
            erased: Concepts that are erased already, which the world does not suggest as anchors or to be retained.
            tell: Whether to warn of words that are taken for objects because nobody says what they are.

        Raises:
            ConceptError: There is no concept, one is given twice, the texts are ambiguous or contradict each other, or
                an anchor equals its concept.
        """
        requests = self.requests(given)
        entries = self._expanded(requests)
        gone = frozenset([*(entry.target for entry in entries), *(name for each in erased for name in each.names)])
        common = ConceptRequest("", kind, anchor, tuple(retain) or None, tuple(synonyms) or None, tuple(templates))
        made = as_concepts(
            [entry if isinstance(entry, Concept) else self._concept(entry, common, gone) for entry in entries]
        )
        for concept in made:
            self._check(concept)
        told = [concept for concept, entry in zip(made, entries, strict=True) if entry is not concept]
        self._warn(word for concept in told for word in (concept.target, concept.anchor, *concept.retain) if word)
        if tell and not (kind or templates):
            self.tell_assumed(requests)
        return made

    def assumed(self, requests: Sequence[ConceptRequest | Concept]) -> list[str]:
        """List names that are taken for objects because neither the request nor the model says what they are."""
        unsaid = [each for each in requests if isinstance(each, ConceptRequest) and not (each.kind or each.templates)]
        return [] if self.declared else [each.target for each in unsaid if not self.knows(each.target)]

    def tell_assumed(self, requests: Sequence[ConceptRequest | Concept]) -> None:
        """Give one warning for all names that are `assumed` to be objects, with how to say what they are."""
        if names := self.assumed(requests):
            warnings.warn(
                f"{taken_for_objects(names)} Write NAME:style for a style, and NAME:object for an object; for other "
                "prompts, as of a person, give templates",
                ConceptWarning,
                stacklevel=4,
            )

    def knows(self, word: str) -> bool:
        """Whether a word is declared by the world, or is one learned token of the pipeline."""
        return word.strip() in self.learned or self.find(word) is not None

    def _expanded(self, requests: Sequence[ConceptRequest | Concept]) -> list[ConceptRequest | Concept]:
        """Give requests in the world's spelling; groups are replaced by members that are not listed themselves."""
        each: list[list[ConceptRequest | Concept]] = []
        for request in requests:
            classes = None
            if isinstance(request, ConceptRequest) and request.target not in self.learned:
                classes = self.find(request.target, request.kind)
            each.append([request] if classes is None else [replace(request, target=name) for name in classes.members])
        there = {key(names[0].target) for names in each if len(names) == 1}
        found: list[ConceptRequest | Concept] = []
        for names in each:
            found += names if len(names) == 1 else [entry for entry in names if key(entry.target) not in there]
            there |= {key(entry.target) for entry in names}
        return found

    def _concept(self, own: ConceptRequest, common: ConceptRequest, erased: Collection[str]) -> Concept:
        """Complete a request from the common options and the world."""
        word = own.target
        chosen = common.anchor if own.anchor is None else own.anchor
        if chosen is None:
            chosen = self.anchor(word, erased)
        elif chosen:
            chosen = self._spelled(chosen)
        kept = common.retain if own.retain is None else own.retain
        others = common.synonyms if own.synonyms is None else own.synonyms
        return Concept(
            word,
            kind=own.kind or common.kind or self.kind(word),
            anchor=chosen,
            retain=self._suggested(word, erased) if kept is None else self._kept(kept, erased),
            synonyms=self.synonyms.get(word, ()) if others is None else parse_names(others, self.knows),
            templates=own.templates or common.templates,
        )

    def _suggested(self, word: str, erased: Collection[str]) -> tuple[str, ...]:
        """Give the world's retain list of a word, without erased concepts."""
        return tuple(other for other in self.retain.get(word, ()) if other not in erased)

    def _kept(self, texts: Sequence[str], erased: Collection[str]) -> tuple[str, ...]:
        """Expand a retain list; a group stands for its members that are not erased."""
        found: list[str] = []
        for word in parse_names(texts, self.knows):
            classes = None if word in self.learned else self.find(word)
            if classes is not None and len(classes.members) > 1:
                found += [member for member in classes.members if member not in erased]
            else:
                found.append(self._spelled(word))
        return tuple(dict.fromkeys(found))

    def _spelled(self, word: str) -> str:
        """Give a word in the world's spelling; synonyms, groups and unknown words do not change."""
        classes = None if word in self.learned else self.find(word)
        if (
            classes is not None
            and len(classes.members) == 1
            and classes.members[0] in singulars(key(word).removesuffix(" style"))
        ):
            return classes.members[0]
        return word

    def _warn(self, words: Iterable[str]) -> None:
        """Give one warning for all words that a declared world does not have."""
        unknown = [word for word in dict.fromkeys(words) if not (self.knows(word) or PLACEHOLDER.fullmatch(word))]
        if not self.declared or not unknown:
            return
        names = [*self.objects, *self.styles, *self.groups, *(o for others in self.synonyms.values() for o in others)]
        close = {word: get_close_matches(key(word), names, n=1) for word in unknown[:5]}
        hints = ", ".join(f"did you mean {match[0]!r} by {shown(word)}?" for word, match in close.items() if match)
        listed = ", ".join(map(shown, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        warnings.warn(
            f"{listed}: no word of the model's world, so prompts with it may mean nothing to the model; "
            f"{hints or 'is it the right model?'}",
            ConceptWarning,
            stacklevel=3,
        )

    def _check(self, concept: Concept) -> None:
        """Refuse a concept whose anchor, or a retained name, is another word for the concept itself."""
        own = self.find(concept.target, concept.kind)
        if own is None:
            return
        if concept.anchor and self.find(concept.anchor, concept.kind) == own:
            raise ConceptError(
                f"the anchor {concept.anchor!r} is another word for {concept.target!r} in the model's world, so that "
                "nothing would change: name what shall take its place, or '' for nothing"
            )
        if same := [word for word in concept.retain if self.find(word, concept.kind) == own]:
            raise ConceptError(
                f"{same[0]!r}, which is to be retained, is another word for {concept.target!r}, which is to be "
                "erased, in the model's world: take it off the list"
            )


def taken_for_objects(names: Sequence[str]) -> str:
    """Say that names are taken for objects, with a prompt of theirs."""
    listed = ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{listed}: taken for {'objects' if len(names) > 1 else 'an object'}, with prompts such as "
        f"{shown(Concept(names[0]).prompts()[2])}."
    )


Wanted = str | Concept | ConceptRequest
"""A concept as given by a user."""
