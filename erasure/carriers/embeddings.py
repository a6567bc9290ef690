"""Learned vectors in place of words: how soft prompts and adversarial prefixes enter a text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from erasure.backbones import TextTower
from erasure.interop import hooks, paths
from erasure.interop.hooks import ModelHook

_INJECT = "erasure_injected_embeddings"


class _Inject(ModelHook):
    """On the token embedding: puts learned vectors in place of some tokens."""

    def __init__(self, place: Tensor, vectors: Tensor) -> None:
        super().__init__()
        self.place, self.vectors = place, vectors

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        rows = self.vectors.to(output.dtype).expand(len(output), -1, -1)
        return output.index_copy(1, self.place, rows)


@contextmanager
def injected(tower: TextTower, place: Tensor, vectors: Tensor) -> Iterator[None]:
    """Read vectors instead of the tokens at some places; differentiable.

    The ids stay as they are, so the end token is found where it was. Leaving in the middle of an error takes the hook
    off too.

    Args:
        tower: The text encoder.
        place: `(tokens,)`, the same in every prompt.
        vectors: `(tokens, dim)` for all prompts, or `(prompts, tokens, dim)`.
    """
    table = paths.token_table(tower.root)
    with hooks.hooked(table, _Inject(place, vectors), _INJECT):
        yield
