"""Worlds: what words mean to a model, which kind a concept is, what takes its place, what must survive.

Everybody asks here: the functions, the command line, the evaluation and what builds the embedded models.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from erasure.concept import PLACEHOLDER, Concept, Kind, as_concepts, key, singulars
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
    """Anchor of each object or style."""
    retain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Concepts that must survive the erasure of an object or style."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call that the model was made for."""
    ip_adapter: str = ""
    """Name of an embedded IP-Adapter for the model, or the folder of another; empty where none is declared."""
    learned: frozenset[str] = frozenset()
    """Tokens that the pipeline has learned (textual inversion); no text is read as more than one of them."""

    @classmethod
    def of(cls, pipe: object) -> World:
        """The world of a pipeline's model, found where the pipeline was loaded from.

        Raises:
            ArtifactError: Its `canvas.json` is damaged.
        """
        tokenizers = (getattr(pipe, name, None) for name in TOKENIZERS)
        learned = {token for tokenizer in tokenizers for token in getattr(tokenizer, "added_tokens_encoder", ())}
        return replace(cls.at(getattr(pipe, "name_or_path", None) or ""), learned=frozenset(learned))

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
            ip_adapter=facts.get("ip_adapter", ""),
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
        """Guidance that the model was made for, by whichever name its pipeline takes it."""
        return float(self.generation.get("true_cfg_scale", self.generation.get("guidance_scale", 3.0)))

    @property
    def side(self) -> int:
        """Side of an image in pixels that the model was made for."""
        return int(self.generation.get("height", 64))

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the model was made for, where it says so."""
        height, width = (self.generation.get(name) for name in ("height", "width"))
        return None if height is None or width is None else (int(height), int(width))

    def call_settings(self, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        """How the model draws: as somebody says, else as it was made for; what is left out is the pipeline's own.

        Args:
            steps: Denoising steps.
            guidance: Scale of guidance.
        """
        settings = dict(self.generation)
        if settings.pop("true_cfg_scale", None) is not None:
            settings["guidance_scale"] = self.guidance_scale
        given = {"num_inference_steps": steps, "guidance_scale": guidance}
        return settings | {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def embedded(name: str) -> Path | None:
        """Folder of what comes with the package under a name, such as `canvas-turbo`; `None` where there is none."""
        from erasure import assets

        return assets.find(name)

    @property
    def image_prompts(self) -> Path | None:
        """Folder of the IP-Adapter that the model declares."""
        from erasure import assets

        return (assets.find(self.ip_adapter) or Path(self.ip_adapter)) if self.ip_adapter else None

    @property
    def text_length(self) -> int | None:
        """Tokens that text encoders of free length pad prompts to, where the model says so."""
        length = self.generation.get("max_sequence_length")
        return None if length is None else int(length)

    # Words --------------------------------------------------------------------------------------------------------

    def find(self, word: str, kind: Kind | None = None) -> Classes | None:
        """The classes that a word stands for; `None` where the world has no such object, style, group or synonym.

        Args:
            word: A name, in any case and number, with or without article.
            kind: Decides where the world has an object and a style of that name.
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
        """The classes of every object, group and synonym, and those of every style, by the `key` of the word."""
        objects: dict[str, tuple[str, ...]] = {
            **dict(self.groups),
            **({name: self.unsafe for name in ALL_UNSAFE} if self.unsafe else {}),
            **{other: (name,) for name, others in self.synonyms.items() for other in others},
            **{name: (name,) for name in self.objects},
        }
        return {key(name): found for name, found in objects.items()}, {key(name): (name,) for name in self.styles}

    def words(self, word: str) -> tuple[str, ...]:
        """Every word for what a word stands for: its classes and their synonyms."""
        classes = self.find(word)
        members = () if classes is None else classes.members
        return tuple(other for name in members for other in (name, *self.synonyms.get(name, ())))

    def kind(self, word: str) -> Kind:
        """Tell what kind of concept a word is: as the world lists it, and an object elsewhere."""
        found = self.find(word)
        if found is None or found.domain == "object":
            return "unsafe" if found and set(found.members) <= set(self.unsafe) else "object"
        return "style"

    def anchor(self, word: str, erased: Collection[str] = ()) -> str | None:
        """Suggest what takes the place of a word, passing over what is erased; `None` where nothing is declared.

        Where all that the world's anchors lead to is erased, it is the next of its objects or styles that is left.
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
        """The concept of a word; see `concepts`.

        Raises:
            ConceptError: The word stands for several: it names a group, or is a list.
        """
        made = self.concepts(word, kind=kind)
        if len(made) > 1:
            names = ", ".join(concept.target for concept in made)
            raise ConceptError(f"{word!r} stands for several concepts ({names}): name one of them")
        return made[0]

    def requests(self, words: Wanted | Sequence[Wanted], kind: Kind | None = None) -> list[ConceptRequest | Concept]:
        """Read the concepts that texts name, groups as they are written; see `erasure.parsing` for the syntax.

        Args:
            words: One text or several; a `Concept` or a request among them is taken as it stands.
            kind: What words are of which a text does not say it.

        Raises:
            ConceptError: A text names none, or could mean several things.
        """
        items = [words] if isinstance(words, (str, Concept, ConceptRequest)) else words
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
        erased: Sequence[Concept] = (),
    ) -> list[Concept]:
        """The concepts that texts name; a `Concept` among them is taken as it stands.

        What a text does not say itself is as the options say, and else as the world has it. Warns of words that a
        declared world does not have.

        Args:
            given: One or several; see `erasure.parsing` for what a text may say. A group stands for its members.
            kind: What the words are.
            anchor: What takes their place ("" for nothing).
            retain: What must survive. Of a group, this is what is not erased.
            synonyms: Other words for the concept, erased along with it.
            erased: What is erased already: the world suggests none of it as an anchor, or to be retained.

        Raises:
            ConceptError: None is given, one is given twice, the texts could mean several things or contradict each
                other, or an anchor is what it stands for.
        """
        entries = self._expanded(self.requests(given))
        gone = frozenset([*(entry.target for entry in entries), *(name for each in erased for name in each.names)])
        common = ConceptRequest("", kind, anchor, tuple(retain) or None, tuple(synonyms) or None)
        made = as_concepts(
            [entry if isinstance(entry, Concept) else self._concept(entry, common, gone) for entry in entries]
        )
        for concept in made:
            self._check(concept)
        told = [concept for concept, entry in zip(made, entries, strict=True) if entry is not concept]
        self._warn(word for concept in told for word in (concept.target, concept.anchor, *concept.retain) if word)
        return made

    def knows(self, word: str) -> bool:
        """Whether a word is one that the world declares, or one learned token of the pipeline."""
        return word.strip() in self.learned or self.find(word) is not None

    def _expanded(self, requests: Sequence[ConceptRequest | Concept]) -> list[ConceptRequest | Concept]:
        """Requests in the world's own spelling, groups as those of their members that are not named beside them."""
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
        """A request with what it leaves open filled in."""
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
            templates=own.templates,
        )

    def _suggested(self, word: str, erased: Collection[str]) -> tuple[str, ...]:
        """What the world says must survive the erasure of a word, but for what is erased."""
        return tuple(other for other in self.retain.get(word, ()) if other not in erased)

    def _kept(self, texts: Sequence[str], erased: Collection[str]) -> tuple[str, ...]:
        """Expand what must survive; a group stands for those of its members that are not erased."""
        found: list[str] = []
        for word in parse_names(texts, self.knows):
            classes = None if word in self.learned else self.find(word)
            if classes is not None and len(classes.members) > 1:
                found += [member for member in classes.members if member not in erased]
            else:
                found.append(self._spelled(word))
        return tuple(dict.fromkeys(found))

    def _spelled(self, word: str) -> str:
        """A word as the world spells it; a synonym, a group and what the world does not have as it is given."""
        classes = None if word in self.learned else self.find(word)
        if (
            classes is not None
            and len(classes.members) == 1
            and classes.members[0] in singulars(key(word).removesuffix(" style"))
        ):
            return classes.members[0]
        return word

    def _warn(self, words: Iterable[str]) -> None:
        """Warn of words that a declared world does not have, all at once."""
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
        """Refuse a concept whose anchor, or what must survive, is the concept itself in another word."""
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


Wanted = str | Concept | ConceptRequest
"""A concept as a user may give it."""
