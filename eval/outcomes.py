"""What becomes of a piece of work that others do not wait for: done, refused for a known reason, or failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, Literal, NamedTuple, TypeVar

from erasure.errors import (
    ConceptError,
    ErasureError,
    EvaluationError,
    NoMatchingModuleError,
    OptionError,
    ResultsFolderError,
    UnsupportedModelError,
)
from erasure.eval.scoring import reason

T = TypeVar("T")
State = Literal["done", "refused", "failed"]
REFUSALS = (EvaluationError, OptionError, UnsupportedModelError, ConceptError, NoMatchingModuleError)
"""What is raised where this model does not allow the work, or where something is lacking that the user must give; but
`ResultsFolderError` says nothing of the model."""
FAILURES = (ErasureError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, OSError)
"""What else may go wrong without that the rest need stop."""


class Attempted(NamedTuple, Generic[T]):
    """The outcome of a piece of work."""

    state: State
    result: T | None
    """`None` where it was refused or failed."""
    reason: str
    """Why it was refused or failed, on one line; empty where it is done."""
    seconds: float
    """Wall time; of what was done before, what it takes to read it."""


def attempted(work: Callable[[], T]) -> Attempted[T]:
    """Do some work, and return its outcome instead of raising."""
    started = time.perf_counter()

    def ended(state: State, result: T | None, why: str) -> Attempted[T]:
        return Attempted(state, result, why, time.perf_counter() - started)

    try:
        return ended("done", work(), "")
    except ResultsFolderError as error:
        return ended("failed", None, str(error).split("\n")[0])
    except REFUSALS as error:
        return ended("refused", None, str(error).split("\n")[0])
    except FAILURES as error:
        return ended("failed", None, reason(error))
