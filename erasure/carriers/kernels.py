"""Attention with keys left out, with keys weighted, and the mass that chosen keys receive, all on fused kernels.

Queries, keys and values are laid out `(batch, tokens, heads, dim)`, as diffusers' `dispatch_attention_fn` takes them.
No function forms the matrix of probabilities, and none passes a mask to a backend, so flash, sage, cuDNN and xformers
kernels all serve. Equal to the dense arithmetic up to rounding, which is smaller here, since no logit is shifted by
the least finite number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.errors import UnsupportedModelError
from erasure.interop.attention import AttentionBackendName, Backend, active_backend, dispatch_attention_fn

ALIGNMENT = 8
"""Head dimensions that fused kernels take are multiples of this."""


def attend(query: Tensor, key: Tensor, value: Tensor, backend: Backend = None, scale: float | None = None) -> Tensor:
    """`softmax(scale q k^T) v`, `(batch, queries, heads, dim)`.

    Args:
        query: `(batch, queries, heads, dim)`.
        key: `(batch, keys, heads, dim)`.
        value: `(batch, keys, heads, dim)`.
        backend: Of diffusers' attention dispatcher; the active one when left out.
        scale: Of the logits; `1 / sqrt(dim)` when left out.
    """
    return dispatch_attention_fn(query, key, value, scale=scale, backend=backend)


def attend_without(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, backend: Backend = None) -> Tensor:
    """Compute attention to some keys only, as if the others were masked, at the cost of the kept keys.

    Args:
        query: `(batch, queries, heads, dim)`.
        key: `(batch, keys, heads, dim)`.
        value: `(batch, keys, heads, dim)`.
        keep: `(kept,)` int64 positions of keys, the same for the whole batch, at least one.
        backend: See `attend`.
    """
    return attend(query, key.index_select(1, keep), value.index_select(1, keep), backend)


def attend_weighted(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor, backend: Backend = None) -> Tensor:
    """Compute attention whose probabilities are multiplied by a weight per key and normalised again.

    The logits get `log_weight` added, as one more channel: queries there are 1, keys `log_weight / scale`.

    Args:
        query: `(batch, queries, heads, dim)`.
        key: `(batch, keys, heads, dim)`.
        value: `(batch, keys, heads, dim)`.
        log_weight: `(batch, keys)`, finite.
        backend: See `attend`.

    Raises:
        UnsupportedModelError: The backend quantises keys to 8 bits, which a channel of another size would ruin.
    """
    name = AttentionBackendName(backend).value if backend is not None else active_backend()
    if "sage" in name:
        raise UnsupportedModelError(
            f"the attention backend {name!r} quantises keys and cannot weight them: choose another backend, or leave "
            "the keys out altogether"
        )
    dim = query.shape[-1]
    width = -(-(dim + 1) // ALIGNMENT) * ALIGNMENT
    scale = dim**-0.5
    pad = (0, width - dim - 1)
    one = torch.ones_like(query[..., :1])
    bias = (log_weight / scale).to(key.dtype)[:, :, None, None].expand(*key.shape[:-1], 1)
    wide = (F.pad(torch.cat([query, one], -1), pad), F.pad(torch.cat([key, bias], -1), pad))
    return attend(*wide, F.pad(value, (0, width - dim)), backend, scale)[..., :dim]


def attention_mass(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """Compute each query's attention to weighted keys, mean over heads: `sum_j A_ij w_jm`.

    A column of the attention matrix when `w` is 1 for one key and 0 elsewhere; the matrix applied to maps when `w`
    holds maps. Differentiable; always torch's own kernel, since others have no gradient.

    Args:
        query: `(batch, queries, heads, dim)`.
        key: `(batch, keys, heads, dim)`.
        weights: `(batch, keys, maps)`.

    Returns:
        `(batch, queries, maps)`.
    """
    maps, dim = weights.shape[-1], query.shape[-1]
    # Values as wide as the queries, so that the kernel needs no special case.
    value = F.pad(weights.to(query.dtype), (0, max(dim - maps, 0)))[:, :, None].expand(-1, -1, query.shape[2], -1)
    return attend(query, key, value, AttentionBackendName.NATIVE)[..., :maps].mean(2)
