"""Thread-safe use of tokenisers, whose padding and truncation are shared state."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from erasure.leases import Lease

_METHODS = ("_encode_plus", "_batch_encode_plus")
"""What sets padding and truncation and then encodes; the second is of transformers before 5."""


class _InTurn:
    """One method of one tokeniser, for one thread at a time. An object, so that a deep copy serves the copy."""

    def __init__(self, tokenizer: object, method: str) -> None:
        self.tokenizer, self.method = tokenizer, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's method."""
        with Lease([self.tokenizer], exclusive=True):
            return getattr(type(self.tokenizer), self.method)(self.tokenizer, *args, **kwargs)


def take_turns(pipe: DiffusionPipeline) -> None:
    """Let threads that share the tokenisers of a pipeline use them one after the other.

    Otherwise a prompt could get another thread's padding: a pinned encoding would not be found by its ids, and the
    conditioning would differ. The lock changes no results, so it is never removed.
    """
    for tokenizer in pipe.components.values():
        if hasattr(tokenizer, "backend_tokenizer"):
            for method in _METHODS:
                if hasattr(type(tokenizer), method) and method not in vars(tokenizer):
                    vars(tokenizer)[method] = _InTurn(tokenizer, method)
