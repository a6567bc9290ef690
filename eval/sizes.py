"""Sizes of suites, attacks and stress tests: how much is drawn, and with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from erasure.errors import EvaluationError
from erasure.options import Options
from erasure.shown import did_you_mean

# No import of torch here: the command line lists what has sizes without it.

SIZES = ("smoke", "quick", "full")
"""`smoke`: does it run. `quick`: minutes on a laptop with a small model. `full`: the numbers to publish, as the paper
has it where there is one."""


def check_size(size: str | None, what: str) -> None:
    """Refuse an unknown size.

    Args:
        size: Its name.
        what: What is to be of that size, for the message: `attack p4d`.

    Raises:
        EvaluationError: There is no such size; the message names the nearest.
    """
    if size not in SIZES:
        hint = did_you_mean(str(size), SIZES)
        raise EvaluationError(f"{what} has no size {size!r}; there are: {', '.join(SIZES)}.{hint}")


@dataclass(frozen=True, kw_only=True)
class SizedOptions(Options):
    """Options with presets by size: subclass it as a frozen dataclass."""

    kind: ClassVar[str] = ""
    """What it is, in the singular, for messages: `attack`."""
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Options of each size; those of `full` are the paper's, where there is one."""

    @classmethod
    def configured(cls, size: str | None = "quick", **options: object) -> Self:  # type: ignore[override]
        """Make an instance of a size with single options changed.

        Raises:
            EvaluationError: An unknown size.
            OptionError: An unknown option, or a value that an option does not allow.
        """
        check_size(size, f"{cls.kind} {cls.name}")
        return super().configured(None, **{**cls.sizes.get(size or "", {}), **options})
