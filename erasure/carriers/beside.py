"""Low-rank edits that run beside layers whose weights cannot be written, because they are quantised.

`y = W x + sum_i strength_i * up_i (down_i x)`. The sum is a hook on the layer itself, not a PEFT adapter: what a user
does with adapters (loading, scaling per call, switching off, unloading) does not reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.carriers.edits import LowRank
from erasure.interop import hooks, paths
from erasure.interop.hooks import SurroundingHook

_HOOK = "erasure_beside"
Terms = list[tuple[float, LowRank]]
"""(strength, edit) pairs of one layer."""


class _Beside(SurroundingHook):
    """On a linear layer: adds what the edits make of its input."""

    def __init__(self, terms: Sequence[tuple[float, LowRank]]) -> None:
        super().__init__()
        self.terms = tuple(terms)
        # One product of ranks for all terms together.
        self.down = torch.cat([edit.down.float() for _, edit in terms])
        self.up = torch.cat([strength * edit.up.float() for strength, edit in terms], 1)

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the layer and add to its output."""
        output = forward(x, *args, **kwargs)
        if self.down.device != x.device or self.down.dtype != x.dtype:
            self.down, self.up = self.down.to(x.device, x.dtype), self.up.to(x.device, x.dtype)
        return output + F.linear(F.linear(x, self.down), self.up).to(output.dtype)


def write(component: nn.Module, terms: Mapping[str, Terms]) -> None:
    """Make exactly these edits run, by path of the layer; none removes the hooks."""
    if is_written(component, terms):
        return
    hooks.remove_hooks(component, _HOOK)
    for path, edits in terms.items():
        hooks.register_hook(paths.layer(component, path), _Beside(edits), _HOOK)


def is_written(component: nn.Module, terms: Mapping[str, Terms]) -> bool:
    """Whether exactly these edits run."""
    hooked = {id(part): part for part in component.modules() if hooks.find_hook(part, _HOOK) is not None}
    wanted = {id(paths.layer(component, path)): edits for path, edits in terms.items()}
    if hooked.keys() != wanted.keys():
        return False
    for key, module in hooked.items():
        hook, edits = hooks.find_hook(module, _HOOK), wanted[key]
        if not isinstance(hook, _Beside) or not hooks.runs_hook(module, _HOOK) or len(hook.terms) != len(edits):
            return False
        if any(a[0] != b[0] or a[1] is not b[1] for a, b in zip(hook.terms, edits, strict=True)):
            return False
    return True
