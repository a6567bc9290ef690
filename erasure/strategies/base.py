"""What a strategy is, and how it is found."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from erasure.errors import OptionError, UnknownStrategyError
from erasure.registry import Registry

if TYPE_CHECKING:
    from erasure.backbones import Backbone
    from erasure.carriers.edits import Edits
    from erasure.concept import Concept

BUILTIN = ("hirm", "uce", "diff_quickfix", "itd", "esd", "advunlearn")

Presets = dict[str, dict[str, object]]
"""Named sets of options."""


class Fit(NamedTuple):
    """What a strategy makes."""

    edits: Edits
    """Tensors on the CPU."""
    log: dict[str, float]
    """Figures worth keeping, for instance the last loss."""
    gates: Mapping[str, dict[str, Any]] = MappingProxyType({})
    """By concept, how well its gate tells it, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """A method of erasure with its options: subclass it as a frozen dataclass and register it.

    Fields are the options. Every behaviour that the package promises of strategies is tested over the registry, so a
    registered one is tested.
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
    presets: ClassVar[Presets] = {}
    """Named sets of options, for instance those of the paper."""
    trains: ClassVar[bool] = False
    """Whether it trains on trajectories, so that a killed run goes on."""
    signed: ClassVar[tuple[str, ...]] = ()
    """Options that may be negative."""

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow.

        Raises:
            OptionError: A choice that is none of the listed ones, or something else than a number.
        """
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                allowed = ", ".join(map(repr, get_args(hint)))
                raise OptionError(f"{self.name}: option {name!r} is {value!r}; allowed: {allowed}")
            numeric = {int: Integral, float: Real}.get(hint)
            least = -math.inf if name in self.signed else 0
            if numeric and (not isinstance(value, numeric) or not math.isfinite(value) or value < least):
                allowed = hint.__name__ + ("" if name in self.signed else ", 0 or more")
                raise OptionError(f"{self.name}: option {name!r} is {value!r}; allowed: {allowed}")

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

    @classmethod
    def configured(cls: type[S], preset: str | None = None, **options: object) -> S:
        """An instance from a preset with single options changed.

        Raises:
            OptionError: An unknown preset or option, or a value that an option does not allow.
        """
        if preset is not None and preset not in cls.presets:
            raise OptionError(f"{cls.name} has no preset {preset!r}; there are: {', '.join(cls.presets) or 'none'}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [option for option in options if option not in known]
        if unknown:
            raise OptionError(f"{cls.name} has no option {unknown[0]!r}; there are: {', '.join(known)}")
        return cls(**{**cls.presets.get(preset or "", {}), **options})


S = TypeVar("S", bound=Strategy)


def _refusal(thing: object) -> str:
    """What keeps a thing from being a strategy, or nothing."""
    if not (isinstance(thing, type) and issubclass(thing, Strategy)):
        return "it is no subclass of erasure.strategies.Strategy"
    if not dataclasses.is_dataclass(thing) or "__dataclass_fields__" not in vars(thing):
        return "it lacks the decorator dataclass(frozen=True, kw_only=True)"
    return ""


STRATEGIES: Registry[type[Strategy]] = Registry(
    "strategy",
    {name: f"erasure.strategies.{name}" for name in BUILTIN},
    told=("title", "paper", "families", "protects", "cost", "carriers", "presets", "trains"),
    accepts=_refusal,
    unknown=UnknownStrategyError,
)


def register(name: str) -> Callable[[type[S]], type[S]]:
    """Class decorator: make a strategy known under a name.

    Packages of others may instead name their class in the entry-point group `erasure.strategies`.
    """

    def add(strategy: type[S]) -> type[S]:
        STRATEGIES.add(name, strategy)
        return strategy

    return add


def available() -> dict[str, type[Strategy]]:
    """Every strategy by name, those of other packages among them; one that cannot be loaded is warned of."""
    return STRATEGIES.available()


def get(name: str) -> type[Strategy]:
    """The strategy of a name.

    Raises:
        UnknownStrategyError: There is none; the message names the nearest.
        BrokenPluginError: Another package names it, and it cannot be loaded.
    """
    return STRATEGIES.get(name)
