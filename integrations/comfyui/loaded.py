"""What ComfyUI's loaders give, as far as the nodes use it, and the weights that are in it.

Written from the interface that ComfyUI documents for nodes and from what its own nodes call; nothing of it is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

from torch import Tensor, nn

from erasure.errors import WrongBaseError

DENOISER = "diffusion_model."
"""What the names of the denoiser's tensors begin with in a MODEL."""
Slice = tuple[int, int, int]
"""Side, first row and number of rows of a part of a tensor."""
Target = str | tuple[str, Slice]
"""A tensor that ComfyUI patches, or a part of one."""
Patches = Mapping[Target, object]
"""Patches by what they patch; their form is ComfyUI's own."""


class Patcher(Protocol):
    """ComfyUI's `ModelPatcher`, which is what a MODEL is."""

    model: nn.Module

    def clone(self) -> Self:
        """Give another one of the same weights, with patches of its own."""
        ...

    def add_patches(self, patches: Patches, strength_patch: float = 1.0) -> Collection[Target]:
        """Add patches, and give those whose tensor is there."""
        ...

    def get_key_patches(self) -> Mapping[str, Sequence[object]]:
        """Give by tensor: its value without patches and a function that unpacks it, and then every patch."""
        ...


class Clip(Protocol):
    """ComfyUI's `CLIP`: the text encoders of a model."""

    cond_stage_model: nn.Module
    patcher: Patcher

    def clone(self) -> Self:
        """Give another one of the same weights, with patches of its own."""
        ...

    def add_patches(self, patches: Patches, strength_patch: float = 1.0) -> Collection[Target]:
        """Add patches, and give those whose tensor is there."""
        ...


@dataclass(frozen=True)
class Side:
    """A MODEL or a CLIP with the names by which ComfyUI finds its tensors."""

    title: str
    """`MODEL` or `CLIP`."""
    patcher: Patcher
    names: Mapping[str, Target]
    """What a LoRA file calls a layer, and the tensor that it means."""

    @cached_property
    def entries(self) -> Mapping[str, Sequence[object]]:
        """See `Patcher.get_key_patches`."""
        return self.patcher.get_key_patches()

    def base(self, key: str) -> Tensor | None:
        """A tensor without patches, or `None` where there is none of this name."""
        if key not in self.entries:
            return None
        first = self.entries[key][0]
        # Earlier versions give the tensor alone.
        value, unpack = first if isinstance(first, tuple) else (first, None)
        return (value if unpack is None else unpack(value, inplace=False)).detach()

    def required(self, target: Target) -> Tensor:
        """The part of a tensor that a patch of `target` changes, without patches.

        Raises:
            WrongBaseError: There is none.
        """
        key, place = (target, None) if isinstance(target, str) else (target[0], target[1])
        if (found := self.base(key)) is None:
            raise WrongBaseError(f"this {self.title} has no tensor {key!r}: the erasure was made for another model")
        return found if place is None else found.narrow(*place)

    def patches_of(self, key: str) -> Sequence[object]:
        """The patches that are on a tensor, in the order in which they act."""
        return self.entries[key][1:]


NamesOf = Callable[[nn.Module, dict[str, Target]], dict[str, Target]]


def sides_of(model: Patcher, clip: Clip | None) -> tuple[Side, Side | None]:
    """The two sides of a model as ComfyUI's loader of LoRA files sees them.

    Args:
        model: What a loader gives as MODEL.
        clip: What it gives as CLIP.
    """
    from comfy import lora

    unet_names: NamesOf = lora.model_lora_keys_unet
    clip_names: NamesOf = lora.model_lora_keys_clip
    denoiser = Side("MODEL", model, unet_names(model.model, {}))
    if clip is None:
        return denoiser, None
    return denoiser, Side("CLIP", clip.patcher, clip_names(clip.cond_stage_model, {}))
