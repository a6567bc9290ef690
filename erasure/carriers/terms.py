"""Terms: edits in force with their strengths, and whether hooks have exactly those that they should have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import nn

from erasure.interop import hooks, paths

Term = tuple[Any, ...]
"""An edit with its strength, and what else tells how it is in force."""


class HasTerms(Protocol):
    """A hook that computes with terms."""

    @property
    def terms(self) -> Sequence[Term]:
        """The terms."""


Hook = TypeVar("Hook", bound=HasTerms)


def same_terms(one: Sequence[Term], other: Sequence[Term]) -> bool:
    """Whether two sequences have the same edits, as objects, in force alike: at the same strengths, in this order."""
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(_same, a, b)) for a, b in zip(one, other, strict=True)
    )


def _same(one: object, other: object) -> bool:
    # Edits hold tensors, whose values take long to compare.
    return one is other or (isinstance(one, (int, float, str)) and one == other)


def holds_terms(network: nn.Module, name: str, kind: type[Hook], wanted: Mapping[str, Sequence[Term]]) -> bool:
    """Whether exactly some layers of a network have a hook that runs, with exactly their terms.

    Args:
        network: The network.
        name: Name of the hook.
        kind: Its class.
        wanted: Terms by path of the layer.
    """
    hooked = {id(part): part for part in network.modules() if hooks.find_hook(part, name) is not None}
    by_layer = {id(paths.layer(network, path)): terms for path, terms in wanted.items()}
    if hooked.keys() != by_layer.keys():
        return False
    for key, module in hooked.items():
        hook = hooks.find_hook(module, name)
        if not isinstance(hook, kind) or not hooks.runs_hook(module, name):
            return False
        if not same_terms(hook.terms, by_layer[key]):
            return False
    return True
