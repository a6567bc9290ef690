"""Recording of modules' inputs and outputs while other code runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def tapped(module: nn.Module, *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Record a module's output, or its first input, in every pass inside of the block; differentiable.

    Args:
        module: Module that returns a tensor, or a tuple that begins with one.
        inputs: Record the first input instead of the output.
    """
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(args[0] if inputs else output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
