"""Stacking: does the erasure still hold beside others?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from diffusers import DiffusionPipeline

from erasure.artifact import Erasure
from erasure.errors import EvaluationError
from erasure.eval.attempts import Change
from erasure.eval.rows import Record
from erasure.eval.stress import StressTest, register
from erasure.eval.stress.bench import Bench, attached
from erasure.eval.stress.conditions import Condition, with_control
from erasure.options import PathText


@register("stack")
@dataclass(frozen=True, kw_only=True)
class Stack(StressTest):
    """Attach other erasures beside the one that is tested: one at a time, and all together.

    The others alone, on the stock model, are the control: where they hide the concept themselves, nothing can be said
    of the erasure under test.
    """

    title: ClassVar[str] = "other erasures attached beside it"
    paper: ClassVar[str] = "a stress test of this package"
    control: ClassVar[str] = "the stock model with the other erasures alone must still show the concept"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "retained": 2},
        "quick": {"samples": 20, "retained": 12},
        "full": {},
    }

    others: tuple[PathText, ...] = ()
    """Folders or Hub repositories of the other erasures."""

    def conditions(self, bench: Bench) -> list[Condition]:
        """Give each other erasure beside the tested one, then all; each alone on the stock model as control."""
        groups = [[made] for made in self.loaded]
        groups += [self.loaded] if len(self.loaded) > 1 else []
        made = []
        for number, group in enumerate(groups):
            name = "with_all" if len(group) > 1 else f"with_{number + 1}"
            said = ", ".join(each.name for each in group)
            made += with_control(
                name, _beside(group), f"{said} is attached beside the erasure", f"the stock model has {said} attached"
            )
        return made

    @cached_property
    def loaded(self) -> list[Erasure]:
        """The other erasures.

        Raises:
            EvaluationError: None is given.
            ArtifactError: One cannot be read.
        """
        if not self.others:
            raise EvaluationError("no other erasure is given to stack with: others=(FOLDER, ...), --others FOLDER ...")
        return [Erasure.load(source) for source in self.others]

    def recipe(self, bench: Bench) -> Record:
        """Give the options, with fingerprints instead of paths."""
        return super().recipe(bench) | {"others": [f"{made.name} ({made.fingerprint})" for made in self.loaded]}


def _beside(group: Sequence[Erasure]) -> Change:
    @contextmanager
    def change(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        yield attached(pipe, {f"stacked-{n}-{erasure.name}": (erasure, 1.0) for n, erasure in enumerate(group, 1)})

    return change
