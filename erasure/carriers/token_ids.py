"""The token ids of the batch that a text encoder is encoding, for hooks deeper inside of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from erasure.interop import hooks, paths
from erasure.interop.hooks import SurroundingHook

_HOOK = "erasure_token_ids"


class _Call(threading.local):
    """State of the text encoder call that a thread runs."""

    ids: Tensor | None = None


_CALL = _Call()


class _KeepIds(SurroundingHook):
    """Hook on a text encoder that keeps the token ids during a forward pass, also when it fails."""

    def around(self, forward: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        """Run the encoder, with its token ids known to hooks inside."""
        outer = _CALL.ids
        _CALL.ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
        try:
            return forward(*args, **kwargs)
        finally:
            _CALL.ids = outer


def keep_ids(encoder: nn.Module, reader: str, needed: bool) -> None:
    """Make token ids known inside of a text encoder to one reader, or end that."""
    root, name = paths.transformer_root(encoder), f"{_HOOK}_{reader}"
    known = hooks.find_hook(root, name) is not None
    if needed and not known:
        hooks.register_hook(root, _KeepIds(), name)
    elif known and not needed:
        hooks.remove_hook(root, name)


def keeps_ids(encoder: nn.Module, reader: str) -> bool:
    """Whether token ids are known inside of a text encoder to a reader."""
    return hooks.runs_hook(paths.transformer_root(encoder), f"{_HOOK}_{reader}")


def current_ids(batch: int, tokens: int) -> Tensor | None:
    """Get the token ids `(batch, tokens)` of this thread's call; `None` outside of one, or for other shapes."""
    ids = _CALL.ids
    return ids if ids is not None and tuple(ids.shape) == (batch, tokens) else None
