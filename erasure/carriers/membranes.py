"""Low-rank branches beside layers of a denoiser, each with the gate of a concept (SPM calls them membranes).

Of a layer's input `x` and output `y`, with the permeability `g_c` of concept `c` for the prompt of the row,

    y' = y + sum_c g_c up_c down_c x

A row with closed gates keeps every bit of its output. The hook on the denoiser (`erasure.carriers.extra_rows`) sets
the openness of gates for each pass; where it is not set, every gate is open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erasure.carriers.permeability import NO_TOKEN, PromptGate
from erasure.carriers.terms import holds_terms
from erasure.errors import ArtifactError, UnsupportedModelError
from erasure.interop import hooks, paths
from erasure.interop.hooks import SurroundingHook

_HOOK = "erasure_membrane"
MEMBRANES, GATES = "membrane", "prompt_gate"
"""Names on disk of branches and of their gates."""
GATED = "opens branches beside layers by the prompt"
"""Description of branches in messages."""


class Membrane(NamedTuple):
    """The branches of one layer."""

    down: Tensor
    """Factors that read the input, `(concepts, rank, in_features)`."""
    up: Tensor
    """Factors that give the output, `(concepts, out_features, rank)`."""

    def fits(self, concepts: int) -> bool:
        """Whether the factors have products, one for each of some concepts."""
        down, up = self.down.shape, self.up.shape
        return len(down) == len(up) == 3 and down[0] == up[0] == concepts and down[1] == up[2]

    @property
    def acts(self) -> bool:
        """Whether one of the branches can change anything."""
        down, up = (part.detach().float().cpu() for part in self)
        return bool((up.flatten(1).any(1) & down.flatten(1).any(1)).any())


class Term(NamedTuple):
    """Branches in force."""

    strength: float
    """Factor of the branches' output."""
    edit: Membrane
    gates: int
    """Index of their gates among those of a pass."""
    multiplies_factors: bool
    """See `PromptGate.rules`."""


Gates = tuple[Tensor | None, ...]
"""For each erasure, how far its gates are open, `(rows, concepts)`; `None` where all are shut."""


class _Pass(threading.local):
    """State of the denoiser pass that a thread runs."""

    gates: Gates | None = None


_PASS = _Pass()


def let_through(gates: Gates | None) -> None:
    """Set the openness of gates in this thread's next pass; after `None` all are open."""
    _PASS.gates = gates


def added(x: Tensor, edit: Membrane, gates: Tensor | None, multiplies_factors: bool) -> Tensor:
    """Compute the output of branches, `(rows, ..., out_features)`.

    Args:
        x: `(rows, ..., in_features)`.
        edit: The branches.
        gates: `(rows, concepts)`; all open when left out.
        multiplies_factors: Multiply the sums of both factors, `(sum_c g_c up_c) (sum_c g_c down_c)`: with one concept
            that is `g_c^2`, with several there are products of one's factor with another's.
    """
    if gates is None:
        gates = x.new_ones(len(x), len(edit.down))
    inside = torch.einsum("b...i,cri->b...cr", x, edit.down)
    weight = gates.view(len(x), *[1] * (inside.ndim - 3), -1, 1)
    if multiplies_factors:
        ups = torch.einsum("bc,cor->bor", gates, edit.up)
        return torch.einsum("b...r,bor->b...o", (weight * inside).sum(-2), ups)
    return torch.einsum("b...cr,cor->b...o", weight * inside, edit.up)


class _Beside(SurroundingHook):
    """Hook on a layer that adds its branches' output."""

    def __init__(self, layer: nn.Module, terms: Sequence[Term]) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.placed = [term.edit for term in self.terms]
        self.is_convolution = isinstance(layer, nn.Conv2d)

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the layer, and add to the rows whose gates are open."""
        output, said = forward(x, *args, **kwargs), _PASS.gates
        for number, term in enumerate(self.terms):
            gates = None if said is None else said[term.gates]
            if said is not None and gates is None:
                continue
            if gates is not None and len(gates) != len(x):
                gates = self.repeated(gates, len(x))
            if self.placed[number].down.device != x.device or self.placed[number].down.dtype != x.dtype:
                self.placed[number] = Membrane(*(part.to(x.device, x.dtype) for part in term.edit))
            own = None if gates is None else gates.to(x.device, x.dtype)
            rows = x.movedim(1, -1) if self.is_convolution else x
            change = added(rows, self.placed[number], own, term.multiplies_factors)
            change = change.movedim(-1, 1) if self.is_convolution else change
            changed = output + (term.strength * change).to(output.dtype)
            if own is None:
                output = changed
            else:
                opened = (own != 0).any(1).view(-1, *[1] * (output.ndim - 1))
                output = torch.where(opened, changed, output)
        return output

    @staticmethod
    def repeated(gates: Tensor, rows: int) -> Tensor:
        """Repeat the gates for a layer that gets all rows of a pass several times in sequence."""
        times, rest = divmod(rows, len(gates))
        if rest:
            raise UnsupportedModelError(
                f"a layer is given {rows} rows in a pass of {len(gates)} prompts, so that nobody knows which prompt "
                "each belongs to: disable_erasures() for such calls, or use a strategy that edits weights (esd, uce)"
            )
        return gates.repeat(times, 1)


def check(membranes: Mapping[str, Membrane], gates: Mapping[str, PromptGate]) -> None:
    """Raise `ArtifactError` unless branches and gates of one erasure are about the same concepts.

    Args:
        membranes: By layer.
        gates: By denoiser and text encoder.
    """
    if bool(membranes) != bool(gates):
        there, lost = ("branches", "gates") if membranes else ("gates", "branches")
        raise ArtifactError(f"the erasure has {there} without {lost}: its files are incomplete; make it again")
    counts = {len(gate.floor) for gate in gates.values()} if gates else {0}
    unlike = (
        len(counts) > 1
        or len({tuple(gate.rules[1:].tolist()) for gate in gates.values() if not gate.rules.is_meta}) > 1
    )
    wrong = next((key for key, one in membranes.items() if not one.fits(max(counts))), None)
    if unlike or wrong is not None:
        raise ArtifactError(
            f"the branches of {wrong or next(iter(gates))!r} and the gates do not fit together: make the erasure again"
        )


def write(denoiser: nn.Module, terms: Mapping[str, Sequence[Term]]) -> None:
    """Make exactly these branches run, by path of the layer; none removes the hooks."""
    if is_written(denoiser, terms):
        return
    hooks.remove_hooks(denoiser, _HOOK)
    for path, own in terms.items():
        layer = paths.layer(denoiser, path)
        hooks.register_hook(layer, _Beside(layer, own), _HOOK)


def is_written(denoiser: nn.Module, terms: Mapping[str, Sequence[Term]]) -> bool:
    """Whether exactly these branches run."""
    return holds_terms(denoiser, _HOOK, _Beside, terms)


def features_of(layer: nn.Module) -> tuple[int, int] | None:
    """Give the numbers of a layer's input and output features, where branches can run beside it."""
    if isinstance(layer, nn.Linear):
        # Not those of its weight, which may be packed: a quantised one has another shape.
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1:
        return layer.in_channels, layer.out_channels
    return None


# Several erasures in one ---------------------------------------------------------------------------------------------


def joined(first: Membrane | None, second: Membrane | None, concepts: tuple[int, int]) -> Membrane:
    """Concatenate the branches of two erasures at one layer; either may have none.

    Args:
        first: Of the one.
        second: Of the other.
        concepts: How many each erasure has.
    """
    there = [part for part in (first, second) if part is not None]
    rank = max(part.down.shape[1] for part in there)
    ins, outs = there[0].down.shape[2], there[0].up.shape[1]
    dtype = torch.promote_types(there[0].down.dtype, there[-1].down.dtype)
    down, up = (torch.zeros(sum(concepts), *shape, dtype=dtype) for shape in ((rank, ins), (outs, rank)))
    for part, start, count in ((first, 0, concepts[0]), (second, concepts[0], concepts[1])):
        if part is not None:
            down[start : start + count, : part.down.shape[1]] = part.down
            up[start : start + count, :, : part.up.shape[2]] = part.up
    return Membrane(down, up)


def joined_gates(key: str, first: PromptGate, second: PromptGate) -> PromptGate:
    """Concatenate the gates of two erasures for one text encoder.

    Raises:
        UnsupportedModelError: They are read in different ways.
    """
    fixed = ("place", "marks", "rules")
    unlike = [name for name in fixed if not torch.equal(getattr(first, name).cpu(), getattr(second, name).cpu())]
    if unlike or first.states.shape[1:] != second.states.shape[1:]:
        raise UnsupportedModelError(
            f"the gates of {key!r} in two erasures are read in different ways ({', '.join(unlike) or 'states'}): "
            "make the second with the options of the first, or attach both"
        )
    longest = max(first.ids.shape[1], second.ids.shape[1])
    ids = [
        torch.cat([part.ids, part.ids.new_full((len(part.ids), longest - part.ids.shape[1]), NO_TOKEN)], 1)
        for part in (first, second)
    ]
    return first._replace(
        states=torch.cat([first.states, second.states]), ids=torch.cat(ids),
        concepts=torch.cat([first.concepts, second.concepts + len(first.floor)]),
        floor=torch.cat([first.floor, second.floor]),
    )  # fmt: skip
