"""Structure of transformers' text encoders: paths of blocks and layers in CLIP and T5."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn


class Anatomy(NamedTuple):
    """Paths of a text encoder's parts below its root; those of a block are below the block."""

    causal: bool
    """Whether attention is causal."""
    blocks: str
    """Path of the list of blocks."""
    attention: str
    """Path of a block's self-attention."""
    attention_out: str
    """Path of the self-attention's output projection."""
    mlp: str
    """Path of a block's MLP."""
    norm: str
    """Path of the final norm."""


CLIP = Anatomy(True, "encoder.layers", "self_attn", "self_attn.out_proj", "mlp", "final_layer_norm")
T5 = Anatomy(
    False, "encoder.block", "layer.0.SelfAttention", "layer.0.SelfAttention.o", "layer.1.DenseReluDense",
    "encoder.final_layer_norm",
)  # fmt: skip


BLOCK = re.compile(rf"(?:{'|'.join(re.escape(each.blocks) for each in (CLIP, T5))})\.(\d+)(?:\.|$)")
"""Path of a block, or of something in it."""


def block_of(path: str) -> int | None:
    """Number of the block that a path leads to or into; `None` for a path that leads to none."""
    match = BLOCK.match(path)
    return None if match is None else int(match[1])


def is_in_t5(path: str) -> bool:
    """Whether a path leads into a block of T5."""
    return path.startswith(f"{T5.blocks}.")


def anatomy_of(root: nn.Module) -> Anatomy | None:
    """The parts of a text encoder's root; `None` for a module that is neither CLIP's nor T5's."""
    inner = getattr(root, "encoder", None)
    if hasattr(inner, "block"):
        return T5
    if hasattr(inner, "layers") and hasattr(root, "final_layer_norm"):
        return CLIP
    return None


def blocks_of(root: nn.Module) -> list[nn.Module]:
    """The blocks of a text encoder's root, first to last; none of another module."""
    anatomy = anatomy_of(root)
    return [] if anatomy is None else list(root.get_submodule(anatomy.blocks).children())


def norm_of(root: nn.Module) -> nn.Module | None:
    """Find the final norm; `None` for a module that is not a text encoder."""
    anatomy = anatomy_of(root)
    return None if anatomy is None else root.get_submodule(anatomy.norm)
