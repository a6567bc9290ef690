"""Where what can be made again is kept, and under which key."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasure.interop import learned
from erasure.interop.protocols import Pipeline, Tokenizer

SAMPLED = 2048
"""Values of each tensor that enter a model's fingerprint."""


def cache_folder() -> Path:
    """`$ERASURE_CACHE`, or `~/.cache/erasure`."""
    return Path(os.environ.get("ERASURE_CACHE") or Path.home() / ".cache" / "erasure")


def digest(value: Any) -> str:
    """sha256 of plain data, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_fingerprint(pipe: Pipeline) -> str:
    """Fingerprint of the weights of a pipeline: name, shape, dtype and evenly spaced values of every tensor.

    Learned tokens (textual inversion) enter by their names and with all their values.

    Reading every byte of a large model would take longer than many an evaluation. Call it with erasures off: adapter
    weights are left out, and a wrapped layer counts as the layer inside.
    """
    found = hashlib.sha256(type(pipe).__name__.encode())
    for name, component in sorted(pipe.components.items()):
        if not isinstance(component, nn.Module):
            continue
        for key, tensor in sorted(component.state_dict().items()):
            if "lora_" in key:
                continue
            found.update(f"{name}/{key.replace('.base_layer', '')}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(_some_bytes(tensor))
        if name.startswith("text_encoder"):
            found.update(_learned_bytes(pipe.components.get(name.replace("text_encoder", "tokenizer")), component))
    return found.hexdigest()[:16]


def _some_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    return _bytes(flat[:: max(1, flat.numel() // SAMPLED)])


def _learned_bytes(tokenizer: Tokenizer | None, encoder: nn.Module) -> bytes:
    """Learned tokens: few rows of a large table, which a sample misses, under names that no tensor tells."""
    if tokenizer is None:
        return b""
    words = learned.ids_by_word(tokenizer)
    return b"".join(word.encode() + _bytes(learned.vectors(tokenizer, encoder, word)) for word in words)


def _bytes(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta":  # offloaded to disk: name and shape have to do
        return b""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two recipes differ, one line per leaf: `size: "quick" here, "full" there`."""
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            line
            for key in sorted({*first, *second})
            for line in differences(first.get(key), second.get(key), f"{path}.{key}" if path else key)
        ]
    if json.dumps(first) == json.dumps(second):
        return []
    return [f"{path or 'recipe'}: {json.dumps(first)} in the first, {json.dumps(second)} in the second"]
