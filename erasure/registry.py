"""Registries: objects of one kind that are found by name, those of other packages included.

A registry knows the names without importing anything. An object is imported when it is needed; its description for
lists and helps is in `registered.json` beside this module, so that these do not need torch.

`.ci/registered` regenerates that file, and a test compares it with the classes.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_type_hints

from erasure import options
from erasure.errors import BrokenPluginError, BrokenPluginWarning, ErasureError
from erasure.shown import did_you_mean

T = TypeVar("T")
Kind = TypeVar("Kind", bound=type)

INDEX = Path(__file__).with_name("registered.json")
"""File with the descriptions of everything in the package."""


@dataclass(frozen=True)
class Option:
    """One field of a registered dataclass."""

    name: str
    type: str
    """Annotation, in the names of `erasure.options`."""
    default: Any
    """Default as in JSON; `None` also when there is none."""
    help: str
    """Docstring of the field, on one line."""


@dataclass(frozen=True)
class Facts:
    """Description of a registered object for lists and helps."""

    name: str
    attributes: Mapping[str, Any]
    """Class attributes that its registry lists, for instance title and paper, as in JSON."""
    options: tuple[Option, ...] = ()
    """Options of the object, when it is a dataclass."""


class Registry(Generic[T]):
    """Objects of one kind, by name.

    Args:
        kind: Kind of the objects, in the singular: `strategy`, `stress test`.
        built_in: Names of this package's objects, and the modules that register them.
        told: Class attributes that lists and helps show.
        accepts: Says what is wrong with an object to register; empty when it is valid.
        unknown: Class of the error for an unknown name.
        instances: Whether objects are instances, made of classes without arguments, and not classes.
    """

    def __init__(
        self,
        kind: str,
        built_in: Mapping[str, str],
        *,
        attributes: tuple[str, ...],
        accepts: Callable[[object], str],
        unknown: type[ErasureError],
        instances: bool = False,
    ) -> None:
        self.kind, self.built_in, self.attributes, self.accepts, self.unknown = (
            kind,
            built_in,
            attributes,
            accepts,
            unknown,
        )
        self.instances = instances
        self.plural = f"{kind.removesuffix('y')}ies" if kind.endswith("y") else f"{kind}s"
        self.group = f"erasure.{self.plural.replace(' ', '_')}"
        """Entry-point group for the objects of other packages."""
        self._registered: dict[str, T] = {}

    # Putting in ---------------------------------------------------------------------------------------------------

    def add(self, name: str, thing: T) -> None:
        """Register an object under a name, which becomes its attribute `name`.

        The same object, registered again when its module is reloaded, replaces itself.

        Raises:
            ValueError: The name is used by another object, or the object is not of this kind.
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
        """Class decorator that registers a class, or an instance of it, under a name; see `add`.

        Other packages can instead list their classes in the entry-point group of the registry.
        """

        def put_in(kind: Kind) -> Kind:
            self.add(name, cast(T, kind() if self.instances else kind))
            return kind

        return put_in

    # Looking up ---------------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """List all names in alphabetical order; nothing is imported."""
        return tuple(sorted({*self._registered, *self.built_in, *self._plugins()}))

    def __contains__(self, name: str) -> bool:
        """Whether anything goes by a name; nothing is imported.

        Other packages are asked last: that reads what all of them declare.
        """
        return name in self._registered or name in self.built_in or name in self._plugins()

    def check(self, name: str) -> None:
        """Refuse an unknown name; nothing is imported.

        Raises:
            ErasureError: The name is unknown; the message gives the nearest name and lists all. The class is the
                registry's own.
        """
        if name not in self:
            names = self.names()
            hint = did_you_mean(name, names)
            raise self.unknown(f"unknown {self.kind} {name!r}; there are: {', '.join(names)}.{hint}")

    def get(self, name: str) -> T:
        """Get the object of a name.

        Raises:
            ErasureError: The name is unknown, see `check`; `BrokenPluginError` when an object of another package
                cannot be loaded.
        """
        if name in self._registered:
            return self._registered[name]
        self.check(name)
        if name in self.built_in:
            import_module(self.built_in[name])
            return self._registered[name]
        return self._load_plugin(name)

    def available(self) -> dict[str, T]:
        """Get all objects by name; those of other packages that cannot be loaded are left out with a warning."""
        found = {}
        for name in self.names():
            try:
                found[name] = self.get(name)
            except BrokenPluginError as error:
                warnings.warn(str(error), BrokenPluginWarning, stacklevel=2)
        return found

    def facts(self, name: str) -> Facts:
        """Give the description of an object; one of this package is not imported.

        Raises:
            ErasureError: See `get`.
        """
        self.check(name)
        if name not in self.built_in:
            return self.describe(name)
        return _facts(_index()[self.plural][name])

    def describe(self, name: str) -> Facts:
        """Make the description from the object itself, which is imported."""
        thing = self.get(name)
        kind = thing if isinstance(thing, type) else type(thing)
        options = tuple(_option(kind, field) for field in fields(kind)) if is_dataclass(kind) else ()
        attributes = {fact: _plain(getattr(thing, fact)) for fact in self.attributes}
        return Facts(name, attributes, options)

    # Plug-ins -----------------------------------------------------------------------------------------------------

    def _plugins(self) -> dict[str, list[EntryPoint]]:
        """Entry points of other packages by name; they cannot use names of this package."""
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
        # Importing another package can fail in any way.
        except (Exception, SystemExit) as error:
            raise BrokenPluginError(
                f"{self.kind} {name!r} of {package} cannot be loaded ({type(error).__name__}: {error}): update that "
                f"package, or uninstall it; what comes with this one works without it"
            ) from error
        return self._registered[name]


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Entry points of a group that installed packages name."""
    places = ((os.path.abspath(place), _changed(place)) for place in sys.path)
    return tuple(_installed(tuple(places)).select(group=group))


def _changed(place: str) -> int | None:
    """When something was last put into a folder of packages, or taken out."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=1)
def _installed(places: tuple[tuple[str, int | None], ...]) -> EntryPoints:
    """Read the entry points of all packages in folders, again only when packages came or went."""
    return entry_points()  # type: ignore[return-value]


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
    """Make the content of `registered.json`: the descriptions of everything in the package."""
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
    """Convert data to the form that JSON gives back."""
    return json.loads(json.dumps(value, default=dict))


def _option(kind: type, field: Field[object]) -> Option:
    owner = next(each for each in kind.__mro__ if field.name in vars(each).get("__annotations__", {}))
    default = None if field.default is MISSING else _plain(field.default)
    return Option(field.name, _annotation(kind, field), default, _docstrings(owner).get(field.name, ""))


def _annotation(kind: type, field: Field[object]) -> str:
    """Give the annotation of a field in the names of `erasure.options`."""
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
    """Read the docstrings of a class's own fields, each on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for field, text in pairwise(definition.body if isinstance(definition, ast.ClassDef) else []):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found
