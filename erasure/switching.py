"""Switching erasures on several components, all or none.

A switch first checks everything and computes every value, and only then writes. Overwritten values are kept until
everything is written, and are restored if anything fails, an interruption included. If even the restoring is
interrupted, the journal stays on the components, and the next access restores the rest.
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
    """A component and its new record."""

    module: nn.Module
    state: ComponentState
    record: Record


@dataclass
class Journal:
    """The values that a running switch has overwritten."""

    targets: list[tuple[ComponentState, nn.Module, Record]]
    """Components with their former records."""
    install: Callable[[], None]
    """Updates hooks and guards by the records."""
    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Parameters with their former values."""
    done: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> Journal:
        """Return the same object: it belongs to the modules of the switch, and copies take no part in it."""
        return self

    @torch.no_grad()
    def undo(self) -> None:
        """Restore all overwritten values; safe to call twice."""
        for parameter, before in reversed(self.tensors):
            parameter.copy_(before)
        for state, module, record in self.targets:
            state.record = record
            state.install(module)
            state.bind(module)
        self.install()
        self.close()

    def close(self) -> None:
        """Remove the journal from the components."""
        self.done = True
        for _, module, _ in self.targets:
            vars(module).pop(_JOURNAL, None)


def interrupted(module: nn.Module) -> bool:
    """Whether an interrupted switch of a component still has to be undone."""
    return _JOURNAL in vars(module) and not vars(module)[_JOURNAL].done


def recover(components: Mapping[str, nn.Module]) -> None:
    """Undo a switch that was interrupted twice: in the middle, and again while it was being undone."""
    for module in components.values():
        if interrupted(module):
            vars(module)[_JOURNAL].undo()


def switch(targets: list[Target], install: Callable[[], None], look: Callable[[], object]) -> None:
    """Give components new records and update them, all or none.

    Args:
        targets: The components; the caller holds an exclusive lease on them.
        install: Updates the pipeline's guards by the records.
        look: Computes the pipeline's outputs when everything is in place; a failure undoes the switch too.

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
