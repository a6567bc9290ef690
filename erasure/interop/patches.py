"""Packages that replace the forwards of a denoiser: DeepCache and tomesd."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from erasure.errors import UnsupportedModelError
from erasure.interop import paths

_TOKENS_MERGED = {"self": "merge_attn", "cross": "merge_crossattn"}
"""Name of tomesd's option that merges tokens ahead of each kind of attention."""


def has_deep_cache(component: nn.Module) -> bool:
    """Whether DeepCache replaces outputs of a component's layers by those of an earlier step."""
    forwards = (vars(part).get("forward") for part in component.modules())
    return any(str(getattr(forward, "__module__", "")).startswith("DeepCache") for forward in forwards)


def refuse_deep_cache(components: Iterable[nn.Module], what: str) -> None:
    """Refuse to work on networks while DeepCache is on.

    It puts closures over the forwards, which a copy of the network shares with it and which `disable()` puts back
    whatever was changed meanwhile; and what it remembers may be of another picture.

    Args:
        components: The networks.
        what: What is refused, for the message.

    Raises:
        UnsupportedModelError: It is on.
    """
    if any(map(has_deep_cache, components)):
        raise UnsupportedModelError(
            f"DeepCache is enabled on this pipeline, under which {what} cannot work: call disable() of its helper "
            "first; plain drawing with erasures attached may have it on again afterwards"
        )


def refuse_merged_tokens(denoiser: nn.Module, kind: str, what: str) -> None:
    """Refuse to change or read attention whose tokens tomesd merges, because their places are then unknown.

    Args:
        denoiser: The UNet.
        kind: Of the attention: `self`, `cross` or `joint`.
        what: What is refused, for the message.

    Raises:
        UnsupportedModelError: It merges tokens ahead of that attention.
    """
    info = getattr(paths.uncompiled(denoiser), "_tome_info", None)
    if info is not None and info.get("args", {}).get(_TOKENS_MERGED.get(kind, "")):
        raise UnsupportedModelError(
            f"tomesd merges tokens ahead of {kind}-attention, under which {what} cannot work: "
            "tomesd.remove_patch(pipe) first"
        )
