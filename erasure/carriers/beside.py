"""Low-rank edits that run beside layers whose weights cannot be written, because they are quantised.

The edits are hooks on the layers, not PEFT adapters, so a user's adapter calls (loading, scaling per call, switching
off, unloading) do not affect them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.carriers.edits import InputMap, LowRank
from erasure.carriers.terms import holds_terms
from erasure.interop import hooks, paths
from erasure.interop.hooks import SurroundingHook

_HOOK = "erasure_beside"
Terms = list[tuple[float, LowRank | InputMap]]
"""Pairs (strength, edit) of one layer."""


class _Beside(SurroundingHook):
    """Hook on a linear layer: maps its input, and adds the low-rank edits' outputs."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.mapped = _Product([(s, edit) for s, edit in terms if isinstance(edit, InputMap)])
        self.added = _Product([(s, edit) for s, edit in terms if isinstance(edit, LowRank)])

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the layer on the mapped input and add the edits' outputs."""
        output = forward(x if self.mapped.is_nothing else x + self.mapped(x), *args, **kwargs)
        return output if self.added.is_nothing else output + self.added(x).to(output.dtype)


class _Product:
    """Computes `sum_i strength_i * up_i (down_i x)` with all terms' factors concatenated."""

    def __init__(self, terms: Sequence[tuple[float, LowRank | InputMap]]) -> None:
        self.is_nothing = not terms
        if terms:
            self.down = torch.cat([edit.down.float() for _, edit in terms])
            self.up = torch.cat([strength * edit.up.float() for strength, edit in terms], 1)

    def __call__(self, x: Tensor) -> Tensor:
        if self.down.device != x.device or self.down.dtype != x.dtype:
            self.down, self.up = self.down.to(x.device, x.dtype), self.up.to(x.device, x.dtype)
        return F.linear(F.linear(x, self.down), self.up)


def write(component: nn.Module, terms: Mapping[str, Terms]) -> None:
    """Put exactly these edits on the layers, by path; an empty mapping removes the hooks."""
    if is_written(component, terms):
        return
    hooks.remove_hooks(component, _HOOK)
    for path, edits in terms.items():
        hooks.register_hook(paths.layer(component, path), _Beside(edits), _HOOK)


def is_written(component: nn.Module, terms: Mapping[str, Terms]) -> bool:
    """Whether exactly these edits are on the layers."""
    return holds_terms(component, _HOOK, _Beside, terms)
