"""What a denoiser is told about a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Source = Literal["tokens", "pooled"]
"""Part of a conditioning: the states of all tokens, or one vector that sums up the prompt."""


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about a batch of prompts; a family leaves out what it has not."""

    tokens: Tensor
    """`(batch, tokens, dim)`."""
    pooled: Tensor | None = None
    """`(batch, dim)`."""
    mask: Tensor | None = None
    """`(batch, tokens)`: 1 where attention may look."""

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.tokens)

    def of(self, source: Source) -> Tensor:
        """One part as vectors of places: `(batch, tokens, dim)`, or `(batch, 1, dim)` of the pooled vector."""
        if source == "tokens":
            return self.tokens
        assert self.pooled is not None, "a layer reads a pooled vector that the family has not"
        return self.pooled[:, None]

    def rows(self, index: Tensor | slice) -> Conditioning:
        """That of some of the prompts, as tensors are indexed."""
        return self._each(lambda part: part[index])

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on a device."""
        return self._each(lambda part: part.to(device))

    def repeated(self, count: int) -> Conditioning:
        """That of one prompt for `count` rows, without copies."""
        return self._each(lambda part: part.expand(count, *part.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Those of several batches of one family, one after the other."""
        return Conditioning(
            torch.cat([part.tokens for part in parts]),
            _joined([part.pooled for part in parts]),
            _joined([part.mask for part in parts]),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        rest = (None if part is None else change(part) for part in (self.pooled, self.mask))
        return Conditioning(change(self.tokens), *rest)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
