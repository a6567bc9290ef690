"""Paths of modules and parameters in the components of diffusers and transformers: canonical and current ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from erasure.errors import NoMatchingModuleError
from erasure.interop.protocols import Denoiser

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def transformer_root(module: nn.Module) -> nn.Module:
    """Find the module with a text encoder's blocks, which `CLIPTextModelWithProjection` nests."""
    inner = getattr(module, "text_model", None)
    return inner if isinstance(inner, nn.Module) else module


def token_entry(root: nn.Module) -> nn.Module:
    """Find the module that gets a text encoder's token ids: CLIP's `embeddings`, T5's `encoder.embed_tokens`."""
    found = getattr(root, "embeddings", None)
    return found if isinstance(found, nn.Module) else root.get_submodule("encoder.embed_tokens")


def token_table(root: nn.Module) -> nn.Embedding:
    """Find the embedding of a text encoder's tokens."""
    entry = token_entry(root)
    found = getattr(entry, "token_embedding", entry)
    assert isinstance(found, nn.Embedding)
    return found


def has_free_u(component: nn.Module) -> bool:
    """Whether FreeU rescales what a UNet's blocks compute."""
    return any(getattr(block, "b1", None) is not None for block in getattr(component, "up_blocks", ()))


def free_u(component: nn.Module) -> dict[str, object]:
    """Give the factors of FreeU on a UNet; empty without FreeU."""
    blocks = getattr(component, "up_blocks", ())
    found = [[getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")] for block in blocks]
    return {"free_u": found} if has_free_u(component) else {}


def decoder_parts(component: nn.Module) -> list[tuple[nn.Module, list[int | None]]]:
    """The blocks of a UNet's decoder, and where each of their parts reads features of the encoder; none elsewhere.

    Returns:
        For each block 0 for parts in which the decoder's own features have the most channels of all, 1 where they have
        the second most, `None` elsewhere; the part that runs first ahead.
    """
    component = uncompiled(component)
    blocks = list(getattr(component, "up_blocks", ()))
    if not blocks:
        return []
    channels: Sequence[int] = cast(Denoiser, component).config.block_out_channels
    widths = sorted(set(channels), reverse=True)[:2]
    found, given = [], channels[-1]
    for block in blocks:
        # The first part reads what the block before gives, the others what their neighbour does.
        read = [given, *(part.out_channels for part in block.resnets[:-1])]
        given = block.resnets[-1].out_channels
        found.append((block, [widths.index(size) if size in widths else None for size in read]))
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `module.compile()` runs a module's forward."""
    return getattr(module, "_orig_mod", None) is not None or module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """Find the module inside the wrapper of `torch.compile`."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def base_layer(module: nn.Module) -> nn.Module:
    """Find the layer inside of PEFT wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def canonical_parameters(component: nn.Module) -> dict[str, str]:
    """Map canonical paths to current paths of a text encoder root's parameters, without PEFT's own."""
    root = transformer_root(component)
    names = [name for name, _ in root.named_parameters() if ".lora_" not in name]
    return {name.replace(".base_layer.", "."): name for name in names}


def parameter(component: nn.Module, path: str) -> Tensor:
    """Find a parameter by canonical path: without `text_model.`, and inside of PEFT wrappers.

    Raises:
        AttributeError: There is no such parameter.
    """
    owner, name = path.rsplit(".", 1)
    module = base_layer(transformer_root(component).get_submodule(owner))
    found = getattr(module, name, None)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{type(module).__name__} at {owner!r} has no parameter {name!r}")
    return found


def holder_of(component: nn.Module, path: str) -> nn.Module | None:
    """The module that should have a parameter of this path, and has something else of its name or nothing."""
    try:
        return base_layer(transformer_root(component).get_submodule(path.rsplit(".", 1)[0]))
    except AttributeError:
        return None


def layer(component: nn.Module, path: str) -> nn.Module:
    """Find a module by canonical path, inside of PEFT wrappers."""
    return base_layer(transformer_root(component).get_submodule(path))


def transformer_around(denoiser: nn.Module, path: str) -> str:
    """Path of the transformer of a UNet that an attention layer is in, or of the block that holds it elsewhere."""
    block, _, _ = path.rpartition(".")
    outer = block
    while outer:
        if isinstance(uncompiled(denoiser).get_submodule(outer), Transformer2DModel):
            return outer
        outer = outer.rpartition(".")[0]
    return block


def require_block(component: nn.Module, path: str, name: str) -> nn.Module:
    """Find a block of a text encoder by path.

    Raises:
        NoMatchingModuleError: There is no such block.
    """
    try:
        return transformer_root(component).get_submodule(path)
    except AttributeError:
        raise NoMatchingModuleError(f"{name} has no {path!r}: the erasure was made for another architecture") from None


def is_plain(tensor: Tensor) -> bool:
    """Whether a weight is an ordinary floating-point tensor, not quantised and not offloaded to nowhere."""
    ordinary = type(tensor) in (nn.Parameter, Tensor) and type(tensor.data) is Tensor
    return ordinary and tensor.dtype in PLAIN_DTYPES and tensor.device.type != "meta"


def is_on_meta(component: nn.Module, path: str) -> bool:
    """Whether a parameter holds no values here, because sequential offloading keeps them elsewhere."""
    try:
        return parameter(component, path).device.type == "meta"
    except AttributeError:
        return False


def is_fused(component: nn.Module, path: str) -> bool:
    """Whether the attention module at a path runs with fused query-key-value projections."""
    try:
        attention = transformer_root(component).get_submodule(path)
    except AttributeError:
        return False
    if isinstance(attention, Attention):
        # Unfusing puts the processor back but leaves `fused_projections` set.
        return type(attention.processor).__name__.startswith("Fused")
    return bool(getattr(attention, "fused_projections", False))
