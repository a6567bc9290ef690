"""Openness of gates in the rows of a denoiser's pass, passed to the branches beside its layers.

A row's prompt is recognised by its conditioning (`erasure.carriers.readings`). In a model with several text encoders
the largest value counts. If one of them has not read the prompt, the prompt is unknown, and every gate of the erasure
is open. Negative prompts use the stock model, or their gates are open as far as those of the prompts that they guide;
so are the gates of separate passes for negative prompts, which follow those of the prompts.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.carriers import membranes, readings
from erasure.carriers.calls import latents_of
from erasure.carriers.permeability import POOLED, PromptGate
from erasure.interop.protocols import Settings


class GateTerm(NamedTuple):
    """The gates of one erasure in force, one for each text encoder that the denoiser reads."""

    gates: tuple[PromptGate, ...]
    """Each about the same concepts: what opens one of them opens the concept's branches."""

    @property
    def concepts(self) -> int:
        """Number of concepts."""
        return len(self.gates[0].floor)

    @property
    def guides(self) -> bool:
        """See `PromptGate.guides`."""
        return self.gates[0].guides


class _Last(threading.local):
    """Gates of a thread's last pass, because the same tensors come back at every step of a drawing."""

    conditioning: tuple[weakref.ref[Tensor] | None, ...] = ()
    rows: tuple[int, int] = (0, 0)
    gates: tuple[Tensor, ...] = ()

    def __reduce__(self) -> tuple[type[_Last], tuple[()]]:
        """Copy and pickle it as a new one: a copy of a network is at no drawing."""
        return _Last, ()


class Gating:
    """The gates of every erasure on a denoiser.

    Args:
        terms: What is in force.
    """

    def __init__(self, terms: Sequence[GateTerm]) -> None:
        self.terms, self.last = tuple(terms), _Last()

    def is_of(self, terms: Sequence[GateTerm]) -> bool:
        """Whether exactly these gates are in force."""
        own, others = ([[id(gate) for gate in term.gates] for term in each] for each in (self.terms, terms))
        return own == others

    def say(self, arguments: Settings, prompts: int, added: int = 0, again: Sequence[int] = ()) -> None:
        """Pass the openness of gates in a pass to the branches.

        Args:
            arguments: Of the call, by name, ahead of any change of its rows.
            prompts: How many of its rows, the last ones, are prompts; 0 for a pass of negative prompts alone.
            added: Number of rows behind them that are added for guidance and belong to no prompt.
            again: Rows that are computed once more, behind these.
        """
        if not self.terms:
            return
        gates: list[Tensor | None] = []
        for own in self.opened(arguments, prompts):
            own = torch.cat([own, own.new_zeros(added, own.shape[1]), own[list(again)]])
            gates.append(own if bool(own.any()) else None)
        membranes.let_through(tuple(gates))

    def opened(self, arguments: Settings, prompts: int) -> tuple[Tensor, ...]:
        """Compute the openness of each erasure's gates in the caller's rows, `(rows, concepts)`; see `say`."""
        rows, device, last = len(latents_of(arguments)), latents_of(arguments).device, self.last
        conditioning = {"tokens": arguments.get("encoder_hidden_states"), "pooled": _pooled(arguments)}
        if not prompts:
            known = last.gates if all(len(own) == rows for own in last.gates) else ()
            return tuple(
                known[place] if known and term.guides else torch.zeros(rows, term.concepts, device=device)
                for place, term in enumerate(self.terms)
            )
        attacked = torch.is_grad_enabled() and any(
            part is not None and part.requires_grad for part in conditioning.values()
        )
        refs = tuple(None if part is None else weakref.ref(part) for part in conditioning.values())
        if attacked or last.rows != (rows, prompts) or not _same(last.conditioning, tuple(conditioning.values())):
            last.gates = tuple(self.of_rows(term, conditioning, rows, prompts).to(device) for term in self.terms)
            last.conditioning, last.rows = refs, (rows, prompts)
        return last.gates

    @staticmethod
    def of_rows(term: GateTerm, conditioning: dict[str, Tensor | None], rows: int, prompts: int) -> Tensor:
        """Compute the openness of one erasure's gates, see `opened`."""
        found = torch.zeros(rows, term.concepts)
        for row in range(rows - prompts, rows):
            parts = [
                readings.opened(conditioning["pooled" if gate.source == POOLED else "tokens"], gate, row)
                for gate in term.gates
            ]
            known = [part.float() for part in parts if part is not None]
            found[row] = torch.stack(known).amax(0) if len(known) == len(parts) else torch.ones(term.concepts)
        if term.guides and rows == 2 * prompts:
            found[:prompts] = found[prompts:]
        return found


def _same(refs: Sequence[weakref.ref[Tensor] | None], conditioning: Sequence[Tensor | None]) -> bool:
    """Whether tensors are the same objects as those of weak references."""
    return len(refs) == len(conditioning) and all(
        (None if ref is None else ref()) is part and (ref is None) == (part is None)
        for ref, part in zip(refs, conditioning, strict=True)
    )


def _pooled(arguments: Settings) -> Tensor | None:
    """Find the pooled vectors in a denoiser's arguments, `(rows, dim)`, if it takes any."""
    added = arguments.get("added_cond_kwargs") or {}
    return added.get("text_embeds", arguments.get("pooled_projections"))
