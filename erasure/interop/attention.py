"""Attention kernels, as diffusers dispatches them."""

from __future__ import annotations

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

__all__ = ["AttentionBackendName", "active_backend", "dispatch_attention_fn"]


def active_backend() -> str:
    """Name of the backend that `dispatch_attention_fn` takes unless told otherwise."""
    return _AttentionBackendRegistry.get_active_backend()[0].value
