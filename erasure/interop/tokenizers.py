"""Tokenisers that several threads use: padding and truncation are set on what they share, and then read from it."""

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

    A prompt would get the padding that another thread asked for: a pinned encoding would not be found under its ids,
    and the denoiser would be told something else. What a tokeniser gives is the same, so it stays that way.
    """
    for tokenizer in pipe.components.values():
        if hasattr(tokenizer, "backend_tokenizer"):
            for method in _METHODS:
                if hasattr(type(tokenizer), method) and method not in vars(tokenizer):
                    vars(tokenizer)[method] = _InTurn(tokenizer, method)
