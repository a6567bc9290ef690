"""The cache folder, and fingerprints of models as keys of cached results."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from erasure.files import differences, digest
from erasure.interop import learned
from erasure.interop.protocols import Pipeline, Tokenizer

SAMPLED = 2048
"""Number of values of each tensor in a model's fingerprint."""


def cache_folder() -> Path:
    """Give the cache folder: `$ERASURE_CACHE`, or `~/.cache/erasure`."""
    return Path(os.environ.get("ERASURE_CACHE") or Path.home() / ".cache" / "erasure")


def model_fingerprint(pipe: Pipeline) -> str:
    """Fingerprint a pipeline's weights: name, shape, dtype and evenly spaced values of every tensor.

    Learned tokens (textual inversion) are included by name with all their values.

    Only a sample is read, because reading a large model completely would take longer than many evaluations. Call this
    with erasures off. Adapter weights are left out, and a wrapped layer counts as the layer inside.
    """
    found = hashlib.sha256(type(pipe).__name__.encode())
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module):
            _add(found.update, component, f"{name}/")
        if isinstance(component, nn.Module) and name.startswith("text_encoder"):
            tokenizer = pipe.components.get(name.replace("text_encoder", "tokenizer"))
            _add_learned(found.update, cast("Tokenizer | None", tokenizer), component)
    return found.hexdigest()[:16]


def module_fingerprint(module: nn.Module) -> str:
    """Fingerprint one module's weights; see `model_fingerprint`."""
    found = hashlib.sha256()
    _add(found.update, module, "")
    return found.hexdigest()[:16]


def _add(update: Callable[[bytes], object], module: nn.Module, prefix: str) -> None:
    for key, tensor in sorted(module.state_dict().items()):
        if "lora_" in key:
            continue
        update(f"{prefix}{key.replace('.base_layer', '')}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        update(_bytes(flat[:: max(1, flat.numel() // SAMPLED)]))


def _add_learned(update: Callable[[bytes], object], tokenizer: Tokenizer | None, encoder: nn.Module) -> None:
    """Add learned tokens, which are few rows of a large table and are not named by tensors."""
    if tokenizer is None:
        return
    for word in learned.ids_by_word(tokenizer):
        update(word.encode())
        update(_bytes(learned.vectors(tokenizer, encoder, word)))


def _bytes(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta":  # offloaded to disk: name and shape have to do
        return b""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


__all__ = ["cache_folder", "differences", "digest", "model_fingerprint", "module_fingerprint"]
