"""The arguments of a denoiser's calls by name, and which of them have one row per image of the batch."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from erasure.errors import UnsupportedModelError
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Arguments, Settings

LATENTS = ("sample", "hidden_states")
"""Names of the denoiser's argument for latents: in UNets, and in transformers."""
ROWS = frozenset({
    *LATENTS, "timestep", "encoder_hidden_states", "pooled_projections", "guidance", "class_labels", "timestep_cond",
    "attention_mask", "encoder_attention_mask", "added_cond_kwargs", "cross_attention_kwargs",
    "joint_attention_kwargs", "down_block_additional_residuals", "mid_block_additional_residual",
    "down_intrablock_additional_residuals", "block_controlnet_hidden_states", "controlnet_block_samples",
    "controlnet_single_block_samples", "res_hidden_states_tuple", "temb",
})  # fmt: skip
"""Arguments of denoisers and of their blocks with one row per batch entry, or that contain such tensors."""
SHARED = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "ip_adapter_masks", "scale"})
"""Arguments that all rows share, whatever the size of their first dimension is."""


class NamedArguments(ModelHook):
    """A hook that finds arguments of a call by name, and passes positional ones on by position.

    Args:
        module: A denoiser, or a block of it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The signature is that of the class, because hooks replace the object's own `forward`.
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD][1:]

    def by_name(self, args: tuple[Any, ...], kwargs: Settings) -> Settings:
        """Give the arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def as_called(self, arguments: Settings, positional: int) -> Arguments:
        """Undo `by_name`: give the first `positional` arguments by position."""
        first = self.names[:positional]
        return tuple(arguments[name] for name in first), {k: v for k, v in arguments.items() if k not in first}


def of_rows(arguments: Settings, batch: int, change: Callable[[Tensor], Tensor]) -> Settings:
    """Change the rows of every tensor of a call that has one row per batch entry.

    Args:
        arguments: Arguments of the call, by name.
        batch: Number of rows of the batch.
        change: Gives the new rows of a tensor `(batch, ...)`.

    Raises:
        UnsupportedModelError: It is not known whether an argument has one row per batch entry.
    """
    changed = {}
    for name, value in arguments.items():
        if name in SHARED or not _holds_rows(value, batch):
            changed[name] = value
        elif name in ROWS:
            changed[name] = _rows(value, batch, change)
        else:
            raise UnsupportedModelError(
                f"the denoiser is given {name}=, of which it is not known whether it has a row for each picture; "
                f"known are: {', '.join(sorted(ROWS | SHARED))}. Leave it out"
            )
    return changed


def _holds_rows(value: object, batch: int) -> bool:
    """Whether a value is a tensor of `batch` rows, or contains one."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.shape[0] == batch
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return any(_holds_rows(item, batch) for item in items)


def _rows(value: Any, batch: int, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: item if key in SHARED else _rows(item, batch, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(item, batch, change) for item in value)
    return value


def twice(rows: Tensor) -> Tensor:
    """Repeat rows: all rows, then the same rows again."""
    return torch.cat([rows, rows])


def latents_of(arguments: Settings) -> Tensor:
    """Give the latents of a denoiser's call, `(batch, ...)`."""
    return cast(Tensor, next(arguments[name] for name in LATENTS if name in arguments))


class _Measured(threading.local):
    """Whether a thread's denoiser passes are measurements and not part of an image's sampling."""

    on = False


_MEASURED = _Measured()


@contextmanager
def measured() -> Iterator[None]:
    """Mark this thread's passes inside of the block as measurements, to whose batch nothing adds rows."""
    before, _MEASURED.on = _MEASURED.on, True
    try:
        yield
    finally:
        _MEASURED.on = before


def is_measured() -> bool:
    """Whether this thread is inside of `measured`."""
    return _MEASURED.on
