"""The base of all options, and every field of every set of options in the package.

Sets are found by walking the subclasses of `Options` after importing every module, so a new one is tested by existing.
"""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt

import erasure
from erasure.errors import ErasureError, OptionError
from erasure.options import (
    Count,
    NotNegative,
    Options,
    PathText,
    Positive,
    Presets,
    Seed,
    ZeroToOne,
)

NAN, INFINITY = float("nan"), float("inf")
NO_OPTIONS = ("erasure.__main__", "erasure.assets.build")
"""Modules that do something when they are imported, or need what only the build has."""


@dataclass(frozen=True, kw_only=True)
class Blur(Options):
    """Options of every kind."""

    name: ClassVar[str] = "blur"
    presets: ClassVar[Presets] = {"strong": {"radius": 9}, "soft-edge": {"border": "zero"}}

    radius: Count = 3
    sharpness: Annotated[float, Ge(-1), Le(1)] = 0.0
    border: Literal["wrap", "zero"] = "wrap"
    fast: bool = False
    levels: tuple[Count, ...] = ()
    size: tuple[Count, Positive] = (1, 1.0)
    seed: Seed | None = None
    kernel: PathText = ""
    folder: str | Path | None = None
    curve: Mapping[ZeroToOne, NotNegative] = field(default_factory=dict)


# One wording, strict types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("radius", 0, "a whole number, 1 or more"),
        ("radius", True, "a whole number, 1 or more"),
        ("radius", 2.0, "a whole number, 1 or more"),
        ("radius", "2", "a whole number, 1 or more"),
        ("sharpness", NAN, "a number, -1 or more and at most 1"),
        ("sharpness", 1.5, "a number, -1 or more and at most 1"),
        ("sharpness", False, "a number, -1 or more and at most 1"),
        ("sharpness", 10**400, "a number, -1 or more and at most 1"),
        ("sharpness", torch.tensor(0.5), "a number, -1 or more and at most 1"),
        ("sharpness", torch.tensor(True), "a number, -1 or more and at most 1"),
        ("radius", np.True_, "a whole number, 1 or more"),
        ("border", "mirror", "'wrap', 'zero'"),
        ("border", True, "'wrap', 'zero'"),
        ("border", ["wrap"], "'wrap', 'zero'"),
        ("fast", 1, "True or False"),
        ("fast", "no", "True or False"),
        ("fast", None, "True or False"),
        ("levels", (0,), "a list, each of it a whole number, 1 or more"),
        ("levels", "12", "a list, each of it a whole number, 1 or more"),
        ("levels", 3, "a list, each of it a whole number, 1 or more"),
        ("size", (1, 0.0), "a list of 2: a whole number, 1 or more; a number, above 0"),
        ("size", (1,), "a list of 2: a whole number, 1 or more; a number, above 0"),
        ("seed", 2**64, "a whole number, -9223372036854775808 or more and below 18446744073709551616, or None"),
        ("seed", "1", "a whole number, -9223372036854775808 or more and below 18446744073709551616, or None"),
        ("kernel", 5, "a text"),
        ("kernel", None, "a text"),
        ("folder", 5, "a text, or a path, or None"),
        ("folder", b"here", "a text, or a path, or None"),
        ("curve", {2.0: 1.0}, "a dict; each key a number, 0 or more and at most 1; each value a number, 0 or more"),
        ("curve", [1.0], "a dict; each key a number, 0 or more and at most 1; each value a number, 0 or more"),
    ],
)
def test_a_refusal_says_who_what_and_what_is_allowed(option: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        Blur(**{option: value})
    text = str(caught.value)
    assert text.startswith(f"blur: option '{option}' is "), text
    assert text.endswith(f"; allowed: {allowed}"), text
    assert isinstance(caught.value, (ErasureError, ValueError))


@pytest.mark.parametrize("value", ["x" * 10_000, 10**5000, "a\x1b[2Jb\n", torch.zeros(9, 9)],
                         ids=["long", "huge", "control", "tensor"])  # fmt: skip
def test_a_refusal_is_one_short_line(value: object) -> None:
    with pytest.raises(OptionError) as caught:
        Blur(sharpness=value)  # type: ignore[arg-type]
    text = str(caught.value)
    assert len(text) < 300
    assert text.isprintable()


def test_a_list_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(OptionError, match="option 'levels'"):
        Blur(levels=loop)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "given", "kept"),
    [
        ("radius", np.int64(4), 4),
        ("sharpness", np.float32(0.5), 0.5),
        ("sharpness", Fraction(1, 2), 0.5),
        ("sharpness", 1, 1.0),
        ("levels", [1, 2], (1, 2)),
        ("levels", [np.int32(2)], (2,)),
        ("size", [2, 3], (2, 3.0)),
        ("kernel", Path("folder"), "folder"),
        ("kernel", "~/folder", str(Path.home() / "folder")),
        ("folder", Path("folder"), Path("folder")),
        ("seed", None, None),
        ("curve", {0: 1}, {0.0: 1.0}),
    ],
)
def test_what_means_the_same_is_kept_as_pythons_own(option: str, given: Any, kept: Any) -> None:
    value = getattr(Blur(**{option: given}), option)
    assert value == kept
    assert type(value) is type(kept)
    if isinstance(kept, tuple):
        assert [type(part) for part in value] == [type(part) for part in kept]


def test_a_changed_copy_is_checked_and_nothing_changes_in_place() -> None:
    with pytest.raises(OptionError, match="blur: option 'radius' is 0"):
        dataclasses.replace(Blur(), radius=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Blur().radius = 5  # type: ignore[misc]


def test_presets_are_data_and_single_options_change_them() -> None:
    assert Blur.configured() == Blur()
    assert Blur.configured("strong") == Blur(radius=9)
    assert Blur.configured("strong", radius=5, fast=True) == Blur(radius=5, fast=True)
    with pytest.raises(OptionError, match=r"blur: option 'radius' is 0"):
        Blur.configured("strong", radius=0)


def test_unknown_presets_and_options_name_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"blur has no preset 'stong'; there are: strong, soft-edge\. Did you"):
        Blur.configured("stong")
    with pytest.raises(OptionError, match=r"Did you mean 'soft-edge'\?$"):
        Blur.configured("Soft_Edge")
    with pytest.raises(OptionError, match=r"blur has no option 'radios'; there are: .*Did you mean 'radius'\?$"):
        Blur.configured(radios=1)
    with pytest.raises(OptionError, match=r"there are: strong, soft-edge\.$"):
        Blur.configured("zzz")
    with pytest.raises(OptionError, match="has no preset 5"):
        Blur.configured(5)  # type: ignore[arg-type]


def test_a_class_without_a_name_goes_by_its_own() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Plain(Options):
        share: ZeroToOne = 0.0

    with pytest.raises(OptionError, match=r"^Plain: option 'share' is 2;"):
        Plain(share=2)
    with pytest.raises(OptionError, match=r"^Plain has no preset 'any'; there are: none\.$"):
        Plain.configured("any")


def test_arguments_of_a_call_are_divided() -> None:
    assert Blur.divide({"radius": 2, "prompt": "a cat"}) == ({"radius": 2}, {"prompt": "a cat"})


@pytest.mark.parametrize("module", ["erasure.options", "erasure.training.run"])
def test_options_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Every set of options of the package ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """An option of a class."""

    owner: type[Options]
    option: str
    hint: Any

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.option}"


@cache
def classes() -> tuple[type[Options], ...]:
    """Every subclass of `Options` in the package."""
    # Not all of `erasure.__path__`: in a checkout it holds the checkout itself, and so all of this again.
    rooms = [("erasure", erasure.__path__[:1])]
    rooms += [
        (f"erasure.{room}", import_module(f"erasure.{room}").__path__) for room in ("eval", "pipelines", "assets")
    ]
    for room, path in rooms:
        for module in walk_packages(path, f"{room}."):
            if not module.name.startswith(NO_OPTIONS):
                import_module(module.name)

    def below(cls: type[Options]) -> Iterator[type[Options]]:
        for subclass in cls.__subclasses__():
            yield subclass
            yield from below(subclass)

    found = {cls: None for cls in below(Options) if cls.__module__.startswith("erasure.")}
    return tuple(found)


def cases() -> list[Case]:
    """Every option of every class, those that it inherits too."""
    found = []
    for cls in classes():
        found += [Case(cls, item.name, hints_of(cls)[item.name]) for item in dataclasses.fields(cls)]
    return found


@cache
def hints_of(cls: type[Options]) -> dict[str, Any]:
    """The annotations of a class, which take longer to look up than an option to be checked."""
    return get_type_hints(cls, include_extras=True)


def parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: `int | None` has two."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def limits(hint: Any) -> dict[type, float]:
    """The bounds of an annotated number."""
    bounds = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return {type(b): next(iter(vars(b).values())) if hasattr(b, "__dict__") else getattr(b, type(b).__name__.lower())
            for b in bounds if isinstance(b, (Ge, Gt, Le, Lt))}  # fmt: skip


def bare(hint: Any) -> Any:
    """An annotated type without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def refused(hint: Any) -> list[Any]:
    """Values that an annotation must refuse.

    Raises:
        AssertionError: A number without a range, or a type that this test does not know: teach it.
    """
    bad: list[Any] = [object(), b"bytes", torch.tensor(1)]
    optional = type(None) in parts(hint)
    if not optional:
        bad.append(None)
    kinds = [part for part in parts(hint) if part is not type(None)]
    for part in kinds:
        kind, bounds = bare(part), limits(part)
        if kind in (int, float):
            assert bounds, f"a {kind.__name__} without a range"
            step = 1 if kind is int else 1e-3
            bad += [True, False, NAN, INFINITY, -INFINITY, "1", "none of these", [1], 1j]
            bad += [0.5, 1.0] if kind is int else []
            bad += [bounds[Ge] - step] if Ge in bounds else []
            bad += [bounds[Gt], bounds[Gt] - step] if Gt in bounds else []
            bad += [bounds[Le] + step] if Le in bounds else []
            bad += [bounds[Lt], bounds[Lt] + step] if Lt in bounds else []
        elif kind is bool:
            bad += ["no", "yes", "", 0, 1, 0.0]
        elif get_origin(kind) is Literal:
            bad += ["none of these", *(choice.upper() for choice in get_args(kind) if choice.upper() != choice), 0, 1]
        elif kind in (str, Path):
            bad += [0, 1.5, True, ["a"]]
        elif get_origin(kind) is tuple:
            inner = [each for each in get_args(kind) if each is not Ellipsis]
            bad += ["12", 3, {1: 2}, *([value] for value in refused(inner[0]))]
            if Ellipsis not in get_args(kind):
                good = [allowed(each) for each in inner]
                bad += [good[:-1], [*good, good[-1]]]
        elif isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping):
            key, value = get_args(kind)
            bad += ["12", 3, [1], *({allowed(key): each} for each in refused(value))]
            bad += [{each: allowed(value)} for each in refused(key) if each.__hash__ is not None]
        else:
            pytest.fail(f"this test does not know the type {kind}: teach it what must be refused")
    if any(bare(part) is str for part in kinds):
        bad = [value for value in bad if not isinstance(value, str)]
    return bad


def allowed(hint: Any) -> Any:
    """A value that an annotation allows."""
    part = parts(hint)[0]
    kind, bounds = bare(part), limits(part)
    if kind in (int, float):
        low = bounds.get(Ge, bounds.get(Gt, -1) + 1)
        return kind(min(low, bounds.get(Le, low)))
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return {bool: True, str: "a"}[kind]


def complete(cls: type[Options], **options: Any) -> dict[str, Any]:
    """Options for an instance of a class: what must be given, and some."""
    hints = hints_of(cls)
    needed = [f.name for f in dataclasses.fields(cls)
              if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]  # fmt: skip
    return {**{name: allowed(hints[name]) for name in needed}, **options}


def test_the_walk_finds_all_rooms() -> None:
    names = {cls.__name__ for cls in classes()}
    assert {"HiRM", "UCE", "DiffQuickFix", "ItD", "ESD", "AdvUnlearn", "Run", "Optimisation", "Rollout",
            "TrainingOptions"} <= names  # fmt: skip


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_set_is_frozen_and_by_keyword_and_its_presets_are_valid(cls: type[Options]) -> None:
    assert "__dataclass_params__" in vars(cls), "not decorated: @dataclass(frozen=True, kw_only=True)"
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(item.kw_only for item in dataclasses.fields(cls))
    assert cls.__doc__
    if not inspect.isabstract(cls):
        cls(**complete(cls))
        for preset in cls.presets:
            cls.configured(preset)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_option_refuses_what_it_does_not_allow(case: Case) -> None:
    for value in refused(case.hint):
        with pytest.raises(OptionError, match=f"option {case.option!r} is"):
            case.owner.checked(case.option, value)
        if not inspect.isabstract(case.owner):
            with pytest.raises(OptionError, match=f"option {case.option!r} is"):
                case.owner(**complete(case.owner, **{case.option: value}))
