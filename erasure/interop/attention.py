"""Attention kernels, as diffusers dispatches them, and the processors that choose one."""

from __future__ import annotations

from typing import TypeAlias

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

__all__ = ["AttentionBackendName", "Backend", "ChosenBackend", "active_backend", "dispatch_attention_fn"]

Backend: TypeAlias = "AttentionBackendName | str | None"
"""A kernel of diffusers' attention dispatcher; the active one when `None`."""


def active_backend() -> str:
    """Name of the backend that `dispatch_attention_fn` takes unless told otherwise."""
    return _AttentionBackendRegistry.get_active_backend()[0].value


class ChosenBackend:
    """Base of attention processors whose kernel is chosen as that of diffusers' own (`set_attention_backend`).

    Args:
        before: The processor that was there; its kernel is taken over.
    """

    _attention_backend: Backend = None
    _parallel_config: object = None

    def __init__(self, before: object) -> None:
        self._attention_backend = getattr(before, "_attention_backend", None)
        if self._attention_backend is None and "XFormers" in type(before).__name__:
            self._attention_backend = "xformers"

    @property
    def backend(self) -> Backend:
        """The kernel."""
        return self._attention_backend
