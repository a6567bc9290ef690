"""Changing what is in force on several components, all or none.

A switch checks everything, computes every value, and only then writes. What it overwrites is kept until all is
written, and put back when anything ends it early, an interruption included. Should even that be interrupted, the
journal stays on the components and whoever looks next puts back what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from erasure.carriers import weights
from erasure.interop import scopes
from erasure.state import ComponentState, Record

_JOURNAL = "_erasure_journal"


@dataclass
class Target:
    """A component and the record that it is to have."""

    module: nn.Module
    state: ComponentState
    record: Record


@dataclass
class Journal:
    """What a switch that is under way has overwritten."""

    targets: list[tuple[ComponentState, nn.Module, Record]]
    """Each component with the record that it had."""
    install: Callable[[], None]
    """Brings hooks and guards in line with the records."""
    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Each parameter with what it held."""
    done: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> Journal:
        """Give the same object: it is about the modules that it stands on, and no copy takes part in the switch."""
        return self

    @torch.no_grad()
    def undo(self) -> None:
        """Put back whatever has been overwritten; doing so twice does no harm."""
        for parameter, before in reversed(self.tensors):
            parameter.copy_(before)
        for state, module, record in self.targets:
            state.record = record
            state.install(module)
            state.bind(module)
        self.install()
        self.close()

    def close(self) -> None:
        """Take the journal off the components."""
        self.done = True
        for _, module, _ in self.targets:
            vars(module).pop(_JOURNAL, None)


def interrupted(module: nn.Module) -> bool:
    """Whether a switch of a component was interrupted twice and waits to be undone."""
    return _JOURNAL in vars(module) and not vars(module)[_JOURNAL].done


def recover(components: Mapping[str, nn.Module]) -> None:
    """Undo a switch that was interrupted twice: in the middle, and again while it was being undone."""
    for module in components.values():
        if interrupted(module):
            vars(module)[_JOURNAL].undo()


def switch(targets: list[Target], install: Callable[[], None], look: Callable[[], object]) -> None:
    """Give components other records and bring them in line, all or none.

    Args:
        targets: The components; the caller holds an exclusive lease on them.
        install: Brings the guards of the pipeline in line with the records.
        look: Gives what the pipeline computes when everything is in place; its failure undoes the switch too.

    Raises:
        AttachError: Something else changed an edited parameter meanwhile; nothing was switched.
        UnsupportedModelError: A parameter is inside fused projections; nothing was switched.
    """
    plans = [target.state.plan(target.module, target.record) for target in targets]
    journal = Journal([(target.state, target.module, target.state.record) for target in targets], install)
    with scopes.Uninterrupted():
        try:
            for target in targets:
                vars(target.module)[_JOURNAL] = journal
            for target, plan in zip(targets, plans, strict=True):
                weights.write(target.module, plan.values, journal.tensors)
            for target, plan in zip(targets, plans, strict=True):
                target.state.record = replace(target.record, written=plan.written)
                target.state.install(target.module)
                target.state.bind(target.module)
            install()
            canary = look()
            for target in targets:
                target.state.record = replace(target.state.record, canary=canary)
            journal.close()
        except BaseException:
            if not journal.done:
                journal.undo()
            raise
