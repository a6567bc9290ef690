"""Registries: things of one kind that are found by name, those of other packages among them.

A registry knows the names without importing anything. What goes by a name is imported when it is asked for; what is
to be said about it in lists and helps is written in `registered.json` beside this module, so that neither needs torch.

`.ci/registered` writes that file anew, and a test compares it with the classes.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_type_hints

from erasure import options
from erasure.errors import BrokenPluginError, BrokenPluginWarning, ErasureError
from erasure.shown import did_you_mean

T = TypeVar("T")
Kind = TypeVar("Kind", bound=type)

INDEX = Path(__file__).with_name("registered.json")
"""File with the facts of everything that comes with the package."""


@dataclass(frozen=True)
class Option:
    """One field of a registered dataclass."""

    name: str
    type: str
    """Annotation, in names that `erasure.options` has."""
    default: Any
    """As JSON has it; `None` too when there is none."""
    help: str
    """Docstring of the field, on one line."""


@dataclass(frozen=True)
class Facts:
    """Facts of a registered thing, which lists and helps show."""

    name: str
    told: Mapping[str, Any]
    """Class attributes that its registry names, for instance title and paper, as JSON has them."""
    options: tuple[Option, ...] = ()
    """Its options, when it is a dataclass."""


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: What they are, in the singular: `strategy`, `stress test`.
        built_in: Names of those of this package and the modules that register them.
        told: Class attributes that lists and helps show.
        accepts: Says of a thing that is to be registered what is wrong with it, or nothing.
        unknown: Error for a name that nothing goes by.
        instances: Whether things are instances of classes, made without arguments, and not classes.
    """

    def __init__(
        self,
        kind: str,
        built_in: Mapping[str, str],
        *,
        told: tuple[str, ...],
        accepts: Callable[[object], str],
        unknown: type[ErasureError],
        instances: bool = False,
    ) -> None:
        self.kind, self.built_in, self.told, self.accepts, self.unknown = kind, built_in, told, accepts, unknown
        self.instances = instances
        self.plural = f"{kind.removesuffix('y')}ies" if kind.endswith("y") else f"{kind}s"
        self.group = f"erasure.{self.plural.replace(' ', '_')}"
        """Entry-point group in which other packages name theirs."""
        self._registered: dict[str, T] = {}

    # Putting in ---------------------------------------------------------------------------------------------------

    def add(self, name: str, thing: T) -> None:
        """Make a thing known under a name, which becomes its attribute `name`.

        The same thing again, as when its module is reloaded, takes its own place.

        Raises:
            ValueError: The name is taken by another, or the thing is not of this kind.
        """
        if wrong := self.accepts(thing):
            raise ValueError(f"{_origin(thing)} cannot be registered as {self.kind} {name!r}: {wrong}")
        if name in self.built_in and name not in self._registered and _module(thing) != self.built_in[name]:
            import_module(self.built_in[name])
        taken = self._registered.get(name)
        if taken is not None and _origin(taken) != _origin(thing):
            raise ValueError(f"a {self.kind} named {name!r} is registered already: {_origin(taken)}")
        thing.name = name  # type: ignore[attr-defined]
        self._registered[name] = thing

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Class decorator: make a class, or an instance of it, known under a name; see `add`.

        Packages of others may instead name theirs in the entry-point group of the registry.
        """

        def put_in(kind: Kind) -> Kind:
            self.add(name, cast(T, kind() if self.instances else kind))
            return kind

        return put_in

    # Looking up ---------------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Every name, in alphabetical order; nothing is imported."""
        return tuple(sorted({*self._registered, *self.built_in, *self._plugins()}))

    def __contains__(self, name: str) -> bool:
        """Whether anything goes by a name; nothing is imported.

        Other packages are asked last: that reads what all of them declare.
        """
        return name in self._registered or name in self.built_in or name in self._plugins()

    def check(self, name: str) -> None:
        """Refuse a name that nothing goes by; nothing is imported.

        Raises:
            ErasureError: Of the registry's own class; the message names the nearest and lists all.
        """
        if name not in self:
            names = self.names()
            hint = did_you_mean(name, names)
            raise self.unknown(f"unknown {self.kind} {name!r}; there are: {', '.join(names)}.{hint}")

    def get(self, name: str) -> T:
        """The thing of a name.

        Raises:
            ErasureError: There is none, see `check`; `BrokenPluginError` when another package names it and it cannot
                be loaded.
        """
        if name in self._registered:
            return self._registered[name]
        self.check(name)
        if name in self.built_in:
            import_module(self.built_in[name])
            return self._registered[name]
        return self._load_plugin(name)

    def available(self) -> dict[str, T]:
        """Everything by name; what another package names and cannot be loaded is left out with a warning."""
        found = {}
        for name in self.names():
            try:
                found[name] = self.get(name)
            except BrokenPluginError as error:
                warnings.warn(str(error), BrokenPluginWarning, stacklevel=2)
        return found

    def facts(self, name: str) -> Facts:
        """Give the facts of the thing of a name, without importing it when it comes with this package.

        Raises:
            ErasureError: See `get`.
        """
        self.check(name)
        if name not in self.built_in:
            return self.describe(name)
        return _facts(_index()[self.plural][name])

    def describe(self, name: str) -> Facts:
        """Collect the facts from the thing itself, which is imported."""
        thing = self.get(name)
        kind = thing if isinstance(thing, type) else type(thing)
        options = tuple(_option(kind, field) for field in fields(kind)) if is_dataclass(kind) else ()
        told = {fact: _plain(getattr(thing, fact)) for fact in self.told}
        return Facts(name, told, options)

    # Plug-ins -----------------------------------------------------------------------------------------------------

    def _plugins(self) -> dict[str, list[EntryPoint]]:
        """Entry points of other packages by name; a name of this package is not theirs to take."""
        found: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(self.group):
            if point.name not in self.built_in:
                found.setdefault(point.name, []).append(point)
        return found

    def _load_plugin(self, name: str) -> T:
        points = self._plugins()[name]
        package = " and ".join(_package(point) for point in points)
        if len({point.value for point in points}) > 1:
            raise BrokenPluginError(f"two packages name a {self.kind} {name!r}: {package}. Uninstall one of them")
        try:
            self.add(name, points[0].load())
        # What another package does on import is anybody's guess.
        except (Exception, SystemExit) as error:
            raise BrokenPluginError(
                f"{self.kind} {name!r} of {package} cannot be loaded ({type(error).__name__}: {error}): update that "
                f"package, or uninstall it; what comes with this one works without it"
            ) from error
        return self._registered[name]


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _package(point: EntryPoint) -> str:
    name = getattr(point.dist, "name", None)
    return f"the package {name!r}" if name else point.value


def _module(thing: object) -> str:
    return (thing if isinstance(thing, type) else type(thing)).__module__


def _origin(thing: object) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


# What is said about things -------------------------------------------------------------------------------------------


def index_of(registries: Iterable[Registry[Any]]) -> dict[str, dict[str, object]]:
    """Collect the content of `registered.json`: the facts of everything that comes with the package."""
    return {
        registry.plural: {name: asdict(registry.describe(name)) for name in sorted(registry.built_in)}
        for registry in registries
    }


@cache
def _index() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = json.loads(INDEX.read_text(encoding="utf-8"))
    return rows


def _facts(row: Mapping[str, Any]) -> Facts:
    return Facts(**{**row, "options": tuple(Option(**option) for option in row["options"])})


def _plain(value: object) -> Any:
    """Data as it comes back from JSON."""
    return json.loads(json.dumps(value, default=dict))


def _option(kind: type, field: Field[object]) -> Option:
    owner = next(each for each in kind.__mro__ if field.name in vars(each).get("__annotations__", {}))
    default = None if field.default is MISSING else _plain(field.default)
    return Option(field.name, _annotation(kind, field), default, _docstrings(owner).get(field.name, ""))


def _annotation(kind: type, field: Field[object]) -> str:
    """Annotation of a field in names that `erasure.options` has."""
    probe = type("Probe", (), {"__annotations__": {"field": field.type}, "__module__": options.__name__})
    try:
        get_type_hints(probe)
    except NameError:  # an alias of the class's own module
        written = str(get_type_hints(kind, include_extras=True)[field.name]).replace("typing.", "")
        inner = written.removeprefix("Optional[")
        return written if inner == written else f"Union[{inner.removesuffix(']')}, None]"
    return str(field.type)


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """Docstring of every field that a class has of its own, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for field, text in pairwise(definition.body if isinstance(definition, ast.ClassDef) else []):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found
