"""Flags for what is registered, from its facts: nothing of it is imported, so helps and refusals come at once."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Annotated, Any

import tyro

from erasure import options
from erasure.options import Options
from erasure.registry import Facts, Registry


def options_of(registry: Registry[Any], name: str) -> type[Options]:
    """The options of a registered class: a stand-in that parses and checks as the class does.

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
    fields = [
        (one.name, Annotated[one.type, tyro.conf.arg(help=one.help)], field(default=_default(one.default)))
        for one in facts.options
    ]  # fmt: skip
    # Annotations are texts, which are read among the names of the module that a class says it is of.
    own = {"__module__": options.__name__, "name": facts.name, "presets": facts.told.get("presets", {})}
    return make_dataclass(facts.name, fields, bases=(Options,), namespace=own, frozen=True, kw_only=True)


def _default(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def list_of(registry: Registry[Any]) -> str:
    """Names and titles, a line each, for a help."""
    names = registry.names()
    width = max(map(len, names))
    return "\n".join(f"  {name:<{width}}  {registry.facts(name).told['title']}" for name in names)
