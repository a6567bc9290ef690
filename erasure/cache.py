"""Where what can be made again is kept, and under which key."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasure.files import differences, digest

SAMPLED = 2048
"""Values of each tensor that enter a model's fingerprint."""


def cache_folder() -> Path:
    """`$ERASURE_CACHE`, or `~/.cache/erasure`."""
    return Path(os.environ.get("ERASURE_CACHE") or Path.home() / ".cache" / "erasure")


def model_fingerprint(pipe: Any) -> str:
    """Fingerprint of the weights of a pipeline: name, shape, dtype and evenly spaced values of every tensor.

    Reading every byte of a large model would take longer than many an evaluation. Call it with erasures off: adapter
    weights are left out, and a wrapped layer counts as the layer inside.
    """
    found = hashlib.sha256(type(pipe).__name__.encode())
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module):
            _add(found, component, f"{name}/")
    return found.hexdigest()[:16]


def module_fingerprint(module: nn.Module) -> str:
    """Fingerprint of the weights of one module; see `model_fingerprint`."""
    found = hashlib.sha256()
    _add(found, module, "")
    return found.hexdigest()[:16]


def _add(found: hashlib._Hash, module: nn.Module, prefix: str) -> None:
    for key, tensor in sorted(module.state_dict().items()):
        if "lora_" in key:
            continue
        found.update(f"{prefix}{key.replace('.base_layer', '')}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(_some_bytes(tensor))


def _some_bytes(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta":  # offloaded to disk: name and shape have to do
        return b""
    flat = tensor.detach().flatten()
    stride = max(1, flat.numel() // SAMPLED)
    return flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()


__all__ = ["cache_folder", "differences", "digest", "model_fingerprint", "module_fingerprint"]
