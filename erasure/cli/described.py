"""Flags for what is registered, from its facts: nothing of it is imported, so helps and refusals come at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import tyro

from erasure import options
from erasure.cli.arguments import UsageError, parse
from erasure.options import Options
from erasure.registry import Facts, Registry


def options_of(registry: Registry[Any], name: str) -> type[Options]:
    """Give the options of a registered class: a stand-in that parses and checks as the class does.

    Args:
        registry: Where the class is.
        name: Its name. What another package registers is imported, and gives its own class.

    Raises:
        ErasureError: Nothing goes by that name.
    """
    facts = registry.facts(name)
    own: type[Options] = stand_in(facts) if name in registry.built_in else registry.get(name)
    return own


def stand_in(facts: Facts) -> type[Options]:
    """A dataclass with the options that facts tell of."""
    made = [
        (one.name, Annotated[one.type, tyro.conf.arg(help=one.help)], field(default=_default(one.default)))
        for one in facts.options
    ]  # fmt: skip
    # Annotations are texts, which are read among the names of the module that a class says it is of.
    own = {"__module__": options.__name__, "name": facts.name, "presets": facts.attributes.get("presets", {})}
    return make_dataclass(facts.name, made, bases=(Options,), namespace=own, frozen=True, kw_only=True)


def _default(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def parse_with(
    own: type, start: Options, command: str, argv: Sequence[str], about: str, **more: object
) -> SimpleNamespace:
    """Parse a command's options and those of something registered from one flat command line.

    Args:
        own: Dataclass of the command's options.
        start: Options of the registered thing that those which are not given keep.
        command: What the user called, without the program.
        argv: What came after it.
        about: Text of the help.
        **more: Further options, where they start from.

    Returns:
        `command`, `options`, and what `more` names, parsed.

    Raises:
        UsageError: The arguments do not fit, or one option has the name of another.
    """
    parts = {"options": start, **more}
    names = Counter(one.name for kind in (own, *map(type, parts.values())) for one in fields(kind))
    if clash := sorted(name for name, count in names.items() if count > 1):
        raise UsageError(f"{command} has options that the command line also has: {clash}; rename them")
    both = make_dataclass(
        "Both",
        [
            ("command", Annotated[own, tyro.conf.FlagCreatePairsOff]),  # type: ignore[valid-type]
            *((name, type(part), field(default=part)) for name, part in parts.items()),
        ],
        namespace={"__doc__": about},
    )
    return SimpleNamespace(**vars(parse(both, command, argv, negatable=True)))


def changes(options: Options, start: Options) -> dict[str, Any]:
    """The options that differ from those that they started from."""
    return {name: value for name in start.option_names() if (value := getattr(options, name)) != getattr(start, name)}


def list_of(registry: Registry[Any], only: Sequence[str] | None = None) -> str:
    """Names and titles, a line each, for a help: of everything, or of some names."""
    names = registry.names() if only is None else only
    width = max(map(len, registry.names()))
    return "\n".join(f"  {name:<{width}}  {registry.facts(name).attributes['title']}" for name in names)


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag, read ahead of everything else: which other flags there are depends on it."""
    for index, token in enumerate(argv):
        if token == flag and index + 1 < len(argv):
            return argv[index + 1]
        if token.startswith(f"{flag}="):
            return token.removeprefix(f"{flag}=")
    return None
