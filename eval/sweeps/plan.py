"""The file of a sweep: what is erased with what, how each erasure is measured, and the cells that this makes."""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from erasure.concept import Concept
from erasure.errors import ConceptError, ConceptWarning, ErasureError, EvaluationError
from erasure.eval.attacks import ATTACKS
from erasure.eval.audits.parts import Kind
from erasure.eval.inputs import Inputs
from erasure.eval.rows import Record
from erasure.eval.sizes import check_size
from erasure.eval.stress import STRESS_TESTS
from erasure.eval.suites import SUITES
from erasure.files import at_home, digest, read_text, slug
from erasure.parsing import ConceptRequest
from erasure.shown import did_you_mean, visible
from erasure.strategies import STRATEGIES
from erasure.world import World

LARGEST = 2**20
"""Bytes of a file."""
MOST = 1_000_000
"""Cells of a sweep."""
LISTS: dict[str, Kind] = {"suites": "evaluation", "attacks": "attack", "stress": "stress"}
"""Keys that say how erasures are measured, with the kind of each."""
KEYS = ("models", "concepts", "methods", *LISTS, "seeds", "size", "images", "judge", "groups")
OF_METHOD = ("strategy", "label", "preset", "options")
OF_MEASURE = ("name", "label", "size", "options")
KINDS: dict[type, str] = {str: "a text", int: "a whole number", bool: "true or false", dict: "a table", list: "a list",
                          float: "a number"}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A strategy with its options, under a name of its own."""

    label: str
    strategy: str
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """One evaluation, attack or stress test that every erasure goes through."""

    kind: Kind
    name: str
    """In its registry."""
    label: str
    size: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its folder in that of a cell."""
        return f"{self.kind}-{_named(self.label)}"


@dataclass(frozen=True)
class Cell:
    """One erasure, and all that is measured of it."""

    model: str
    method: Method
    concept: str
    """As the file has it, see `erasure.parsing`."""
    seed: int
    """Of the erasure, and of the samples that measure it."""

    @property
    def folder(self) -> Path:
        """Its folder in that of the sweep."""
        return Path(
            "cells", slug(Path(self.model).name), _named(self.method.label), f"{slug(self.concept)}-{self.seed}"
        )

    @property
    def recipe(self) -> Record:
        """All that it depends on besides what is measured."""
        return {"model": self.model, "method": asdict(self.method), "concept": self.concept, "seed": self.seed}

    def __str__(self) -> str:
        """Name it in a message."""
        return f"{self.method.label} of {self.concept!r} on {self.model}, seed {self.seed}"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as its file says it."""

    models: tuple[str, ...]
    concepts: tuple[str, ...]
    methods: tuple[Method, ...]
    measures: tuple[Measure, ...]
    seeds: tuple[int, ...] = (0,)
    images: bool = False
    """Whether images are kept, and a page is written for each evaluation and stress test."""
    judge: str | None = None
    """What `load_judge` takes, in the place of the suites' own detectors."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Concepts by the name of the group that a row of the table is about; one row for all when empty."""

    @classmethod
    def read(cls, path: str | Path, *, size: str | None = None) -> SweepPlan:
        """Read a file.

        Args:
            path: The file, TOML in UTF-8.
            size: Of everything that has no size of its own, in the place of the file's.

        Raises:
            ErasureError: It cannot be read, has a key that there is not, a value of the wrong type, an empty list, or
                names something that there is not. The message says where.
        """
        try:
            data = tomllib.loads(read_text(at_home(path), LARGEST, error=EvaluationError))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise EvaluationError(f"{path} is no TOML ({error}): see docs/sweep.md for an example") from error
        return cls.of(data, str(path), size=size)

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str = "the sweep", *, size: str | None = None) -> SweepPlan:
        """The sweep of plain data, see `read`."""
        _known(data, KEYS, where)
        models = _texts(data, "models", where)
        concepts = _texts(data, "concepts", where)
        seeds = _list(data, "seeds", where) if "seeds" in data else [0]
        for seed in seeds:
            if type(seed) is not int or not 0 <= seed < 2**63:
                raise EvaluationError(f"{where}: seeds has {visible(seed, 100)}, allowed: whole numbers of 0 or more")
        common = size or _typed(data, "size", str, where, "quick")
        check_size(common, f"{where}: a sweep")
        methods = [_method(entry, f"{where}: methods") for entry in _list(data, "methods", where)]
        measures = [
            _measure(kind, entry, common, f"{where}: {key}")
            for key, kind in LISTS.items() if key in data for entry in _list(data, key, where)
        ]  # fmt: skip
        if not measures:
            raise EvaluationError(f"{where} measures nothing: name {', '.join(LISTS)}, or one of them")
        judge = _typed(data, "judge", str, where, None)
        groups = _groups(_typed(data, "groups", dict, where, {}), concepts, where)
        folders = {kind: [each.folder for each in measures if each.kind == kind] for kind in LISTS.values()}
        listed: tuple[tuple[str, Sequence[object]], ...] = (
            ("models", [slug(Path(model).name) for model in models]), ("concepts", [slug(each) for each in concepts]),
            ("seeds", seeds), ("methods", [_named(each.label) for each in methods]),
            *folders.items(),
        )  # fmt: skip
        for what, names in listed:
            if twice := sorted({str(name) for name in names if names.count(name) > 1}):
                raise EvaluationError(
                    f"{where}: {what} has {visible(twice[0], 100)!r} twice: name it once, or give each a label of its "
                    "own"
                )
        if len(models) * len(methods) * len(concepts) * len(seeds) > MOST:
            raise EvaluationError(f"{where} has more than {MOST:,} cells: split it into several files")
        for model in models:
            _check_concepts(model, concepts, where)
        if judge is not None:
            from erasure.eval.judges import load_judge

            load_judge(judge)
        images = _typed(data, "images", bool, where, False)
        return cls(models, concepts, tuple(methods), tuple(measures), tuple(seeds), images, judge, groups)

    @property
    def recipe(self) -> Record:
        """All that the results depend on: the groups of the table do not belong to it."""
        return {key: value for key, value in asdict(self).items() if key != "groups"}

    @property
    def cells(self) -> list[Cell]:
        """All cells, those of one model one behind the other."""
        return [
            Cell(model, method, concept, seed)
            for model in self.models for seed in self.seeds for concept in self.concepts for method in self.methods
        ]  # fmt: skip

    def share(self, number: int, count: int) -> list[Cell]:
        """The cells of one of several machines: every cell is in exactly one share, and all are about as long.

        Args:
            number: Of the machine, from 1 on.
            count: How many there are.
        """
        # Of a plain list every n-th cell might be of one method, and methods take unlike times.
        mixed = sorted(self.cells, key=lambda cell: digest(cell.recipe))
        mine = set(map(str, (cell.folder for cell in mixed[number - 1 :: count])))
        return [cell for cell in self.cells if str(cell.folder) in mine]


def read_share(text: str) -> tuple[int, int]:
    """Number and count of a share such as `1/4`.

    Raises:
        EvaluationError: It is none.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise EvaluationError(f"share is {visible(text, 100)!r}; allowed: 1/4 to 4/4 for four machines, 1/1 for one")
    return int(found[1]), int(found[2])


def _named(label: str) -> str:
    """Name of a folder: that of what is registered as it is, and of other labels what every file system takes."""
    return label if re.fullmatch(r"[a-z0-9_]{1,60}", label, re.ASCII) and "_" in label else slug(label)


# Values -------------------------------------------------------------------------------------------------------------


def _known(data: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in data:
        if key not in keys:
            raise EvaluationError(
                f"{where} has no key {visible(key, 100)!r}; there are: {', '.join(keys)}.{did_you_mean(key, keys)}"
            )


def _in_words(value: object) -> str:
    """Name the type of a value for messages. Dates and times come from TOML, other types from plans made in Python."""
    if isinstance(value, (date, time)):
        return "a time" if isinstance(value, time) else "a date"
    return "nothing" if value is None else KINDS.get(type(value), f"a value of type {type(value).__name__}")


def _typed(data: Mapping[str, Any], key: str, kind: type, where: str, default: Any) -> Any:
    value = data.get(key, default)
    if key in data and type(value) is not kind:
        raise EvaluationError(f"{where}: {key} is {_in_words(value)}, expected {KINDS[kind]}")
    return value


def _list(data: Mapping[str, Any], key: str, where: str) -> list[Any]:
    if key not in data:
        raise EvaluationError(f"{where} says no {key}: add a list, such as {key} = [...]")
    found: list[Any] = _typed(data, key, list, where, [])
    if not found:
        raise EvaluationError(f"{where}: {key} is empty: name one at least, or leave the key out if it may be")
    return found


def _texts(data: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = _list(data, key, where)
    for value in found:
        if type(value) is not str or not value.strip():
            shown = repr(value) if type(value) is str else _in_words(value)
            raise EvaluationError(f"{where}: {key} has {shown}, expected texts")
    return tuple(found)


def _entry(entry: object, keys: Sequence[str], where: str) -> Mapping[str, Any]:
    """A text as the table that it stands for; `keys` begin with the one that the text is of."""
    if type(entry) is str:
        return {keys[0]: entry}
    if type(entry) is not dict:
        raise EvaluationError(f"{where} has {_in_words(entry)}, expected a text or a table")
    _known(entry, keys, f"{where}: a table")
    if keys[0] not in entry:
        raise EvaluationError(f"{where}: a table says no {keys[0]}: add {keys[0]} = ...")
    for key in keys:
        _typed(entry, key, dict if key == "options" else str, where, None)
    return entry


def _method(entry: object, where: str) -> Method:
    data = _entry(entry, OF_METHOD, where)
    strategy, preset, options = data["strategy"], data.get("preset"), data.get("options", {})
    with _located(where):
        STRATEGIES.check(strategy)
        STRATEGIES.get(strategy).configured(preset, **options)
    label = data.get("label") or (strategy if preset is None else f"{strategy}, {preset}")
    return Method(label, strategy, preset, options)


def _measure(kind: Kind, entry: object, size: str, where: str) -> Measure:
    data = _entry(entry, OF_MEASURE, where)
    name, options = data["name"], data.get("options", {})
    found = Measure(kind, name, data.get("label") or name, data.get("size") or size, options)
    with _located(where):
        check_size(found.size, f"{kind} {name}")
        if kind == "evaluation":
            SUITES.check(name)
            Inputs.read(options)
        elif kind == "attack":
            ATTACKS.get(name).configured(found.size, **options)
        else:
            STRESS_TESTS.get(name).configured(found.size, **options)
    return found


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Say in errors of the package where in the file they come from."""
    try:
        yield
    except ErasureError as error:
        raise EvaluationError(f"{where}: {error}") from error


def _groups(data: Mapping[str, Any], concepts: Sequence[str], where: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for name in data:
        members = found[name] = _texts(data, name, f"{where}: groups")
        for member in members:
            if member not in concepts:
                raise EvaluationError(
                    f"{where}: group {visible(name, 100)!r} has {visible(member, 100)!r}, which is none of the "
                    f"concepts.{did_you_mean(member, concepts)}"
                )
    return found


def _check_concepts(model: str, concepts: Sequence[str], where: str) -> None:
    """Refuse what is no concept, and what a closed world does not have."""
    world = World.at(model)
    names = [*world.objects, *world.styles, *world.groups]
    asked: list[ConceptRequest | Concept] = []
    for text in concepts:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConceptWarning)
                requests = world.requests(text)
                made = world.concepts(requests)
        except ConceptError as error:
            raise EvaluationError(f"{where}: concepts: {error}") from error
        asked += requests
        for concept in made:
            if world.declared and not world.knows(concept.target):
                raise EvaluationError(
                    f"{where}: concepts has {visible(concept.target, 100)!r}, which {visible(model, 100)} does not "
                    f"have; there are: {', '.join(names)}.{did_you_mean(concept.target, names)}"
                )
    world.tell_assumed(asked)
