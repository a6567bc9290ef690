"""The requests of an erasure in their order, and the effect of a new request on the earlier ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from erasure import artifact
from erasure.artifact import Erasure
from erasure.concept import MOST_CONCEPTS, Concept, key, numbers
from erasure.errors import ConceptError, ConceptWarning
from erasure.schema import ErasureConfig, Request
from erasure.world import World


class Merged(NamedTuple):
    """The concepts of an erasure after an addition."""

    earlier: list[Concept]
    """Concepts of earlier requests, updated by the addition."""
    moved: list[Concept]
    """Earlier concepts with a new anchor, because their former anchor is now erased too."""
    new: list[Concept]
    """Added concepts."""

    @property
    def every(self) -> list[Concept]:
        """All concepts, in the order of the requests."""
        return [*self.earlier, *self.new]

    @property
    def still_erased(self) -> list[Concept]:
        """Give the earlier concepts that need not be erased again."""
        return [concept for concept in self.earlier if concept not in self.moved]


def read(source: Erasure | str | Path) -> Erasure:
    """Read an erasure to which concepts are to be added, from memory, a folder or a repository of the Hub.

    Raises:
        ArtifactError: The erasure is missing or damaged.
    """
    return source if isinstance(source, Erasure) else Erasure.load(source)


def merged(world: World, made: Erasure, new: Sequence[Concept]) -> Merged:
    """Add concepts to those of an erasure.

    The latest request has priority. If it erases the anchor of an earlier concept, that concept gets the new concept's
    anchor, or the one that the world suggests. If it erases a name on an earlier retain list, that name is removed
    from the list. Both cases give a warning.

    Args:
        world: World of the model.
        made: The erasure.
        new: Concepts to add.

    Raises:
        ConceptError: A new concept, its anchor or a name on its retain list is erased already; or there would be too
            many.
    """
    earlier = made.concepts
    if len(earlier) + len(new) > MOST_CONCEPTS:
        raise ConceptError(
            f"the erasure is of {len(earlier):,} concepts, and with {len(new):,} more it would be of more than the "
            f"{MOST_CONCEPTS:,} that are allowed: make another erasure, and attach both"
        )
    _refuse_again(made, new)
    erased = {key(name): concept.target for concept in new for name in concept.names}
    now, moved = [], []
    for concept in earlier:
        changed = concept
        if lost := [word for word in concept.retain if key(word) in erased]:
            changed = replace(changed, retain=tuple(word for word in concept.retain if word not in lost))
            _warn(f"{', '.join(map(repr, lost))} is erased from now on, and {concept.target!r} retains it no longer")
        if concept.anchor and (numbers(concept.anchor) & set(erased)):
            anchor = _next_anchor(world, concept, earlier, new)
            changed = replace(changed, anchor=anchor)
            _warn(
                f"{concept.anchor!r}, the anchor of {concept.target!r}, is erased from now on: "
                f"{'what the strategy chooses' if anchor is None else repr(anchor)} takes its place"
            )
            moved.append(changed)
        now.append(changed)
    return Merged(now, moved, list(new))


def default_name(made: Erasure, new: Sequence[Concept], strategy: str) -> str:
    """Name an erasure with added concepts.

    Args:
        made: The erasure.
        new: Concepts to add.
        strategy: Name of the strategy of the request.
    """
    names = dict.fromkeys([*(request["strategy"] for request in made.config.ledger), strategy])
    return artifact.default_name([*made.concepts, *new], " + ".join(names))


def _refuse_again(made: Erasure, new: Sequence[Concept]) -> None:
    """Raise `ConceptError` for concepts, anchors and retained names that an earlier request has erased."""
    numbered = [(number, target) for number, each in enumerate(made.config.ledger, 1) for target in each["concepts"]]
    known = {
        key(name): f"{concept.target!r} (request {number})"
        for (number, _), concept in zip(numbered, made.concepts, strict=True)
        for name in concept.names
    }
    for concept in new:
        if again := [name for name in concept.names if key(name) in known]:
            raise ConceptError(
                f"{again[0]!r} is erased already: as {known[key(again[0])]} of {made.name}. Nothing was done; "
                "leave it out"
            )
        if concept.anchor and (gone := sorted(numbers(concept.anchor) & set(known))):
            raise ConceptError(
                f"the anchor {concept.anchor!r} of {concept.target!r} is erased already, as {known[gone[0]]} of "
                f"{made.name}: name another that stays, or '' for nothing"
            )
        if kept := [word for word in concept.retain if key(word) in known]:
            raise ConceptError(
                f"{concept.target!r} retains {kept[0]!r}, which is erased already, as {known[key(kept[0])]} of "
                f"{made.name}: take it off the retain list"
            )


def _next_anchor(world: World, concept: Concept, earlier: Sequence[Concept], new: Sequence[Concept]) -> str | None:
    """Give the next anchor of an earlier concept whose anchor is now erased; `None`: the strategy chooses."""
    before, after = ([each.target for each in some] for some in (earlier, [*earlier, *new]))
    if world.anchor(concept.target, before) == concept.anchor:
        # The anchor came from the world, which suggests the same as if all concepts had been given at once.
        return world.anchor(concept.target, after)
    erased = {key(name): each for each in (*earlier, *new) for name in each.names}
    anchor, passed = concept.anchor, {key(concept.target)}
    while anchor:
        form = next((form for form in sorted(numbers(anchor)) if form in erased), None)
        if form is None:
            return anchor
        if form in passed:
            return None
        passed |= {key(name) for name in erased[form].names}
        anchor = erased[form].anchor
    return anchor


def _warn(message: str) -> None:
    warnings.warn(message, ConceptWarning, stacklevel=5)


def entry(config: ErasureConfig, defaults: Mapping[str, object]) -> Request:
    """Describe an erasure, whose concepts were all given at once, as one request.

    Args:
        config: Config of the erasure.
        defaults: Default options of the strategy, which are left out.
    """
    (request,) = config.ledger
    options = {name: value for name, value in request["options"].items() if not _same(value, defaults.get(name, ...))}
    return Request(**{**request, "options": options})


def extended(earlier: ErasureConfig, request: Request, defaults: Mapping[str, object]) -> list[Request]:
    """Append a request to those of an erasure.

    Args:
        earlier: Config of the erasure.
        request: The new request.
        defaults: Default options of the earlier strategy, which are left out where there was one request.
    """
    return [*(earlier.ledger if earlier.requests else [entry(earlier, defaults)]), request]


def _same(value: object, default: object) -> bool:
    """Whether an option has its default; files have lists instead of tuples."""
    return value == (list(default) if isinstance(default, tuple) else default)
