"""What a strategy is, and how it is found."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

from erasure.backbones import Backbone
from erasure.carriers.edits import Edits
from erasure.concept import Concept
from erasure.errors import UnknownStrategyError
from erasure.options import Options

ENTRY_POINTS = "erasure.strategies"
BUILTIN = ("hirm", "uce", "diff_quickfix", "itd", "esd", "advunlearn")

_registered: dict[str, type[Strategy]] = {}


class Fit(NamedTuple):
    """What a strategy makes."""

    edits: Edits
    """Tensors on the CPU."""
    log: dict[str, float]
    """Figures worth keeping, for instance the last loss."""
    gates: Mapping[str, dict[str, Any]] = MappingProxyType({})
    """By concept, how well its gate tells it, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Strategy(Options, ABC):
    """A method of erasure with its options: subclass it as a frozen, keyword-only dataclass and register it.

    Fields are the options; their annotations say which values are allowed (see `erasure.options.Options`). Every
    behaviour that the package promises of strategies is tested over the registry, so a registered one is tested.
    """

    name: ClassVar[str] = ""
    """Name in the registry; `register` sets it."""
    title: ClassVar[str] = ""
    """What it is, in one line."""
    paper: ClassVar[str] = ""
    """Where it comes from."""
    families: ClassVar[tuple[str, ...]] = ()
    """Model families that it works on."""
    protects: ClassVar[str] = ""
    """`hosted pipeline` when a user who holds the weights can undo it, else `released weights`."""
    cost: ClassVar[str] = ""
    """What making one costs."""
    carriers: ClassVar[tuple[str, ...]] = ("weights",)
    """Where the result lives."""

    @abstractmethod
    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Make the edits.

        Args:
            backbone: The model, with no erasure in force; left as it was found.
            concepts: What to erase, all at once.
            seed: Seeds every random choice.
            progress: To be called with the share that is done, 0-1.
        """


S = TypeVar("S", bound=Strategy)


def register(name: str) -> Callable[[type[S]], type[S]]:
    """Class decorator: make a strategy known under a name.

    Packages of others may instead name their class in the entry-point group `erasure.strategies`.
    """

    def add(strategy: type[S]) -> type[S]:
        taken = _registered.get(name)
        if taken is not None and taken.__qualname__ != strategy.__qualname__:
            raise ValueError(
                f"a strategy named {name!r} is registered already: {taken.__module__}.{taken.__qualname__}"
            )
        strategy.name = name
        _registered[name] = strategy
        return strategy

    return add


@cache
def _plugins() -> dict[str, type[Strategy]]:
    return {point.name: point.load() for point in entry_points(group=ENTRY_POINTS)}


def available() -> dict[str, type[Strategy]]:
    """Every strategy by name: those of this package and those of entry points."""
    for module in BUILTIN:
        import_module(f"erasure.strategies.{module}")
    for name, plugin in _plugins().items():
        if name not in _registered:
            register(name)(plugin)
    return dict(_registered)


def get(name: str) -> type[Strategy]:
    """The strategy of a name.

    Raises:
        UnknownStrategyError: There is none; the message names the nearest.
    """
    strategies = available()
    if name not in strategies:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), strategies, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownStrategyError(f"unknown strategy {name!r}; there are: {', '.join(sorted(strategies))}.{hint}")
    return strategies[name]
