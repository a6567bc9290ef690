"""Marks that show whether a network has changed, cheap enough to be compared before every call.

Modules, parameters and hooks are compared by identity, writes to parameters by torch's version counters, and chosen
parameters by a sample of their values, because writes through `.data` are not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from erasure.interop import paths

VALUES = 16
"""Number of compared values of a parameter."""


class Change(NamedTuple):
    """A change of a network."""

    path: str
    """Path of the module in the network; empty for the network itself."""
    what: str
    """What changed, for a message."""
    adapter: bool = False
    """Whether only a PEFT wrapper was put around a layer, or removed."""


class Marks:
    """The state of a network at one time.

    Args:
        network: The network.
        sampled: Canonical paths of the parameters of which values are compared as well.
    """

    def __init__(self, network: nn.Module, sampled: Collection[str]) -> None:
        self.network = network
        chosen = [paths.parameter(network, path) for path in sampled]
        self.sampled = [parameter for parameter in chosen if paths.is_plain(parameter)]
        named = dict(network.named_modules())
        self.paths, modules = list(named), list(named.values())
        # Tables that modules keep for good; what stands in them is compared all at once, which takes microseconds.
        self.tables = [module._modules for module in modules]
        self.parameter_tables = [module._parameters for module in modules]
        torch_hooks = ((module._forward_hooks, module._forward_pre_hooks) for module in modules)
        self.torch_hooks = list(chain.from_iterable(torch_hooks))
        self.attributes = [module.__dict__ for module in modules]
        registries = [own["_diffusers_hook"] for own in self.attributes if "_diffusers_hook" in own]
        self.hook_tables = [registry.hooks for registry in registries]
        self.state, self.sizes = self._state(), list(map(len, self.tables))
        self.counted = [parameter for parameter in network.parameters() if not parameter.is_inference()]
        self.versions = self._versions()
        self.values = self._values()

    def _state(self) -> list[list[object]]:
        """Children, parameters, hooks, forwards and attention processors of all modules."""
        # Offloading puts another forward on a whole network after each call, which says nothing.
        forwards = [own.get("forward") for own in self.attributes[1:]]
        return [
            _inside(self.tables), _inside(self.parameter_tables), _inside(self.hook_tables), forwards,
            [own.get("processor") for own in self.attributes], _inside(self.torch_hooks),
        ]  # fmt: skip

    def _versions(self) -> list[int]:
        """Give the version counters of parameters; torch has none for those made in inference mode."""
        return list(map(attrgetter("_version"), self.counted))

    def is_as_before(self) -> bool:
        """Whether nothing has changed, as far as marks can tell."""
        same = all(map(_same, self._state(), self.state))
        return same and self._versions() == self.versions and self._values_are_same()

    def changes(self) -> Iterator[Change]:
        """List the changes; an adapter in place of a layer is listed as such."""
        children, parameters, hooks, forwards, processors, torch_hooks = map(_same, self._state(), self.state)
        if not children:
            yield from self._of_children()
        if not parameters:
            # Layers of PEFT have parameters of their own, in tables that are not among these.
            yield Change("", "parameters were replaced")
        if not (hooks and forwards and torch_hooks):
            yield Change("", "hooks or forwards of its layers were changed")
        if not processors:
            yield Change("", "attention processors were changed")
        if self._versions() != self.versions:
            known = {id(parameter): path for path, parameter in self.network.named_parameters()}
            pairs = zip(self.counted, self.versions, strict=True)
            path = next(known.get(id(parameter), "") for parameter, before in pairs if parameter._version != before)
            yield Change(path, "it was written to")
        if not self._values_are_same():
            yield Change("", "edited parameters have other values")

    def _of_children(self) -> Iterator[Change]:
        """List the changes of child modules."""
        start = 0
        for path, table, size in zip(self.paths, self.tables, self.sizes, strict=True):
            before, start = self.state[0][start : start + size], start + size
            if len(table) != size:
                yield Change(path, "modules were added or taken away (an IP-Adapter, or fused projections)")
                continue
            for (name, new), old in zip(table.items(), before, strict=True):
                if new is not old:
                    put_on = isinstance(new, BaseTunerLayer) and new.get_base_layer() is old
                    taken_off = isinstance(old, BaseTunerLayer) and old.get_base_layer() is new
                    where = f"{path}.{name}" if path else name
                    yield Change(where, "a LoRA lies around it" if put_on else "it was replaced", put_on or taken_off)

    @torch.no_grad()
    def _values(self) -> Tensor | None:
        flat = [parameter.detach().flatten() for parameter in self.sampled]
        return torch.cat([each[:: max(1, len(each) // VALUES)] for each in flat]).float() if flat else None

    def _values_are_same(self) -> bool:
        if self.values is None:
            return True
        now = self._values()
        return now is not None and now.shape == self.values.shape and torch.equal(now, self.values.to(now.device))


def _inside(tables: Iterable[Mapping[Any, object]]) -> list[object]:
    """List the objects in some tables."""
    return list(chain.from_iterable(map(dict.values, tables)))  # type: ignore[arg-type]


def _same(now: Collection[object], before: Collection[object]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(now) == len(before) and all(map(is_, now, before))
