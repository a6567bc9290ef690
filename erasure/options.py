"""The base class of all sets of options: ranges are in annotations, presets are data, and errors have one wording."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from erasure.errors import OptionError
from erasure.shown import did_you_mean, visible

# This module does not import torch, so that the command line can read options quickly.

Count = Annotated[int, Ge(1)]
"""A whole number of 1 or more."""
CountOrZero = Annotated[int, Ge(0)]
"""A whole number of 0 or more."""
Positive = Annotated[float, Gt(0)]
"""A number above 0."""
NotNegative = Annotated[float, Ge(0)]
"""A number of 0 or more."""
ZeroToOne = Annotated[float, Ge(0), Le(1)]
"""A number from 0 to 1."""
Decay = Annotated[float, Ge(0), Lt(1)]
"""Decay of a running mean, 0 to below 1."""
Seed = Annotated[int, Ge(-(2**63)), Lt(2**64)]
"""A seed for torch's random generators."""
RunSeed = Annotated[int, Ge(0), Lt(2**63)]
"""A seed of a run, from which seeds of its samples are made."""
PathText = Annotated[
    str, BeforeValidator(lambda value: os.path.expanduser(str(value)) if isinstance(value, str | Path) else value)
]
"""A path or a name as text, so that options are plain data; `~` at its start is the home folder."""


def check_seed(seed: object, what: str, kind: Any = Seed) -> int:
    """Give a seed as a plain whole number; a number of numpy becomes one.

    Args:
        seed: The seed.
        what: What it is for, for the message.
        kind: Which seeds are allowed: `Seed` or `RunSeed`.

    Raises:
        OptionError: It is no whole number, or outside the range of `kind`.
    """
    try:
        return int(TypeAdapter(kind, config=STRICT).validate_python(_plain(seed)))
    except (ValidationError, TypeError, OverflowError):
        raise OptionError(f"{what}: the seed is {_shown(seed)}; allowed: {allowed(kind)}") from None


Presets = Mapping[str, Mapping[str, object]]
"""Named sets of options."""

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
BOUNDS = {Ge: ("ge", "{} or more"), Gt: ("gt", "above {}"), Le: ("le", "at most {}"), Lt: ("lt", "below {}")}
"""Attribute of each bound of `annotated_types`, and how messages call it."""
LONGEST = 100
"""Largest number of characters of a value in messages."""
KINDS: dict[object, str] = {int: "a whole number", float: "a number", str: "a text", Path: "a path",
                            bool: "True or False", type(None): "None"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """A set of options: subclass it as a frozen, keyword-only dataclass whose annotations say what is allowed.

    Every value is checked when an instance is made, also by `dataclasses.replace`. Types are strict: `True` is no
    number, `1` is no `True`, `"1"` is neither. NaN and infinity are refused. A whole number passes for a float,
    numbers of numpy pass for Python's, and a list for a tuple. The test suite fails for a number without a range.

        @dataclass(frozen=True, kw_only=True)
        class Blur(Options):
            name: ClassVar[str] = "blur"
            presets: ClassVar[Presets] = {"strong": {"radius": 9}}

            radius: Count = 3
            sharpness: Annotated[float, Ge(-1), Le(1)] = 0.0
            border: Literal["wrap", "zero"] = "zero"
            levels: tuple[Count, ...] = ()
            seed: Seed | None = None

        Blur.configured("strong", sharpness=0.5)

    Rules about several options are checked in `__post_init__`, after `super().__post_init__()`, and refused by
    `refuse`. A call that also takes other arguments separates them with `divide`.
    """

    name: ClassVar[str] = ""
    """Name of the options in messages; the name of the class when empty."""
    presets: ClassVar[Presets] = {}
    """Named sets of options, for instance those of a paper."""

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            OptionError: An option does not allow its value.
        """
        for option in self.option_names():
            object.__setattr__(self, option, self.checked(option, getattr(self, option)))

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of all options."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def checked(cls, option: str, value: object) -> Any:
        """Check a value of an option and give it as it is stored.

        Raises:
            OptionError: The value is not allowed.
        """
        try:
            return _adapters(cls)[option][1].validate_python(_plain(value))
        except (ValidationError, TypeError, OverflowError, RecursionError):
            cls.refuse(option, value, cls.describe(option))

    @classmethod
    def describe(cls, option: str) -> str:
        """Describe in words which values an option allows."""
        return allowed(_adapters(cls)[option][0])

    @classmethod
    def refuse(cls, option: str, value: object, may_be: str) -> NoReturn:
        """Refuse the value of an option.

        Args:
            option: Name of the option.
            value: The refused value.
            may_be: Allowed values, and what to do where that is not obvious.

        Raises:
            OptionError: Always.
        """
        raise OptionError(f"{cls.name or cls.__name__}: option {option!r} is {_shown(value)}; allowed: {may_be}")

    @classmethod
    def configured(cls, preset: str | None = None, **options: object) -> Self:
        """Make an instance from a preset with single options changed.

        Raises:
            OptionError: A preset or option is unknown, or an option does not allow its value.
        """
        who = cls.name or cls.__name__
        if preset is not None and preset not in cls.presets:
            raise OptionError(
                f"{who} has no preset {_shown(preset)}; there are: {', '.join(cls.presets) or 'none'}."
                f"{did_you_mean(str(preset), cls.presets)}"
            )
        known = cls.option_names()
        for option in options:
            if option not in known:
                hint = did_you_mean(option, known)
                raise OptionError(f"{who} has no option {_shown(option)}; there are: {', '.join(known)}.{hint}")
        return cls(**{**cls.presets.get(preset or "", {}), **options})

    @classmethod
    def divide(cls, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Separate the arguments of a call into these options and all others."""
        known = set(cls.option_names())
        own = {name: value for name, value in arguments.items() if name in known}
        return own, {name: value for name, value in arguments.items() if name not in known}


def allowed(hint: object) -> str:
    """Describe in words which values an annotation allows: "a whole number, 1 or more"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [bound for bound in arguments[1:] if type(bound) in BOUNDS]
        limits = [BOUNDS[type(bound)][1].format(getattr(bound, BOUNDS[type(bound)][0])) for bound in bounds]
        return allowed(arguments[0]) + (", " + " and ".join(limits) if limits else "")
    if origin is Literal:
        return ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return ", or ".join(map(allowed, arguments))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list, each of it {allowed(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {'; '.join(map(allowed, arguments))}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a dict; each key {allowed(arguments[0])}; each value {allowed(arguments[1])}"
    return KINDS.get(hint, str(getattr(hint, "__name__", hint)))


def _adapters(cls: type[Options]) -> dict[str, tuple[object, TypeAdapter[Any]]]:
    """Make the annotation and validator of every option, once per class."""
    if cls not in _known:
        hints = get_type_hints(cls, include_extras=True)
        _known[cls] = {
            option: (hints[option], TypeAdapter(hints[option], config=STRICT)) for option in cls.option_names()
        }
    return _known[cls]


_known: dict[type[Options], dict[str, tuple[object, TypeAdapter[Any]]]] = {}


def _plain(value: object) -> object:
    """Convert numpy's numbers to Python's, and lists to tuples; give other values unchanged.

    Raises:
        TypeError: The value is not a number but would be accepted as one, for instance a tensor.
    """
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if hasattr(value, "__float__"):
        raise TypeError("no number")
    return value


def _shown(value: object) -> str:
    """Format a value for a message: short, on one line, texts in quotes."""
    return visible(repr(value[:LONGEST]) if isinstance(value, str) else value, LONGEST)
