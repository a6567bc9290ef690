"""Queries, keys and values of the attention layers of UNets, SD3 and Flux, and what becomes of their output."""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from erasure.backbones import AttentionSite
from erasure.interop.protocols import AttentionLayer

Rotary = tuple[Tensor, Tensor] | None


def is_fused(attention: nn.Module, processor: object) -> bool:
    """Whether a layer that runs with a processor has its projections in one matrix."""
    # `Attention` keeps the flag after unfusing; Flux' layers have no fused processor.
    named = type(processor).__name__.startswith("Fused") or getattr(processor, "fused", False)
    return named or (not hasattr(attention, "residual_connection") and bool(attention.fused_projections))


def project(
    site: AttentionSite, hidden: Tensor, text: Tensor | None, rotary: Rotary, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values `(batch, tokens, heads, dim)`, normed and rotated, in the layer's token order.

    Args:
        site: The layer, self- or joint attention.
        hidden: `(batch, tokens, channels)`; in Flux' single blocks the text's too.
        text: `(batch, tokens, channels)` of a joint attention with a stream of its own for text.
        rotary: Cosines and sines of the positions of all tokens.
        fused: See `is_fused`.
    """
    attn = cast(AttentionLayer, site.module)
    parts = _heads(attn, hidden, fused, ("to_q", "to_k", "to_v", "to_qkv"), ("norm_q", "norm_k"))
    if text is not None:
        names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv")
        added = _heads(attn, text, fused, names, ("norm_added_q", "norm_added_k"))
        pairs = zip(added, parts, strict=True) if site.text == "first" else zip(parts, added, strict=True)
        parts = [torch.cat(pair, 1) for pair in pairs]
    query, key, value = parts
    if rotary is not None:
        query, key = (apply_rotary_emb(part, rotary, sequence_dim=1) for part in (query, key))
    return query, key, value


def project_cross(site: AttentionSite, hidden: Tensor, text: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Compute queries and keys `(batch, tokens, heads, dim)` of a cross-attention, without an IP-Adapter's keys."""
    attn = cast(AttentionLayer, site.module)
    words = text[0] if isinstance(text, tuple) else text
    if attn.norm_cross:
        words = attn.norm_encoder_hidden_states(words)
    query, key = (part.unflatten(-1, (attn.heads, -1)) for part in (attn.to_q(hidden), attn.to_k(words)))
    return _normed(attn, "norm_q", query), _normed(attn, "norm_k", key)


def finish(site: AttentionSite, out: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the layer's output from the attention's output `(batch, tokens, heads, dim)`."""
    attn = cast(AttentionLayer, site.module)
    hidden = out.flatten(2)
    if text is None:
        return _out(attn, hidden)
    count = text.shape[1]
    if site.text == "first":
        words, hidden = hidden[:, :count], hidden[:, count:]
    else:
        hidden, words = hidden.split([hidden.shape[1] - count, count], 1)
    if not getattr(attn, "context_pre_only", False):
        words = attn.to_add_out(words)
    return _out(attn, hidden), words


def _out(attn: AttentionLayer, hidden: Tensor) -> Tensor:
    layers = getattr(attn, "to_out", None)  # none in Flux' single blocks
    return hidden if layers is None else layers[1](layers[0](hidden))


def _heads(
    attn: AttentionLayer, x: Tensor, fused: bool, layers: tuple[str, ...], norms: tuple[str, str]
) -> list[Tensor]:
    flat = getattr(attn, layers[3])(x).chunk(3, -1) if fused else [getattr(attn, name)(x) for name in layers[:3]]
    query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in flat)
    return [_normed(attn, norms[0], query), _normed(attn, norms[1], key), value]


def _normed(attn: AttentionLayer, name: str, x: Tensor) -> Tensor:
    norm = getattr(attn, name, None)
    return x if norm is None else norm(x)
