"""Checks before saving: erasures that a stock model's files cannot contain are refused, not silently left out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from erasure.errors import AttachError
from erasure.interop import adapters
from erasure.state import ComponentState


def refuse_unsaveable(module: nn.Module, *args: object, **kwargs: object) -> None:
    """Refuse to save a component if its files would lack a part of the erasures in force, or could not be loaded.

    Raises:
        AttachError: An erasure in force uses hooks, or a user's adapter is loaded too.
    """
    refuse_adapters(module)
    state = ComponentState.of(module)
    for name, attached in state.in_force().items() if state else ():
        what = attached.beyond_weights(state.component) if state else None
        if what is not None:
            raise AttachError(
                f"{name!r} {what} besides the weights, which the files of a stock model cannot hold: use "
                "save_erased_pipeline(folder, fuse=False), or disable_erasures() to save the base"
            )


def check_saveable(modules: Iterable[nn.Module], beyond_weights: bool) -> None:
    """Check every component of a pipeline with erasures before the first file is written; see `refuse_unsaveable`."""
    for module in modules:
        refuse_adapters(module)
        if not beyond_weights:
            refuse_unsaveable(module)


def refuse_adapters(module: nn.Module) -> None:
    """Raise `AttachError` where a user's adapter would be written under names that no loader finds."""
    if adapters.tuner_layers(module):
        raise AttachError(
            f"a LoRA is loaded into the {type(module).__name__} beside erasures: its layers would be written under "
            "names that no loader finds. unload_lora_weights() first, and keep the LoRA in a file of its own"
        )
