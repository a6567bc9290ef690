"""Guidance by a second branch of the denoiser: both branches run in one batch, and leave as one prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from erasure.backbones import AttentionSite
from erasure.interop import hooks, paths
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Arguments, Pipeline

_GUIDANCE = "erasure_branch_guidance"
TRUNK = ("down_blocks.", "mid_block.")
"""Parts of a UNet that run ahead of the decoder."""


def can_share_trunk(denoiser: nn.Module, changed: Sequence[AttentionSite]) -> bool:
    """Whether both branches are equal up to the decoder: a UNet of which no layer ahead of that is changed."""
    is_unet = isinstance(paths.uncompiled(denoiser), UNet2DConditionModel)
    return is_unet and not any(site.name.startswith(TRUNK) for site in changed)


def twice(value: Any, batch: int) -> Any:
    """Every tensor of `batch` rows in nested tuples, lists and dictionaries, with its rows repeated once."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: twice(item, batch) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(twice(item, batch) for item in value)
    return value


class BranchGuidance(AbstractContextManager["BranchGuidance"]):
    """`e = e_ordinary + scale (e_changed - e_ordinary)` in place of the denoiser's prediction, while the block runs.

    The caller sees a denoiser of the usual shapes. Inside, rows come twice: ordinary ones, then those that an
    `AttentionController` with two branches changes. With a shared trunk they are repeated only where the decoder
    begins: the blocks ahead of it run once, residuals of a ControlNet included.

    Args:
        denoiser: UNet or transformer.
        scale: Of the guidance.
        shared_trunk: See `can_share_trunk`.
    """

    def __init__(self, denoiser: nn.Module, scale: float, *, shared_trunk: bool) -> None:
        self.denoiser, self.scale, self.shared_trunk = paths.uncompiled(denoiser), scale, shared_trunk
        self._stack = ExitStack()

    def __enter__(self) -> BranchGuidance:
        """Put the hooks in place."""
        with ExitStack() as stack:
            outer = _Combine(self.scale, repeats=not self.shared_trunk)
            stack.enter_context(hooks.hooked(self.denoiser, outer, _GUIDANCE))
            if self.shared_trunk:
                blocks = cast(nn.ModuleList, self.denoiser.up_blocks)
                for block in blocks:
                    stack.enter_context(hooks.hooked(block, _Repeat(outer), _GUIDANCE))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        """Take them off again."""
        self._stack.close()


class _Combine(ModelHook):
    """On the denoiser: repeats what goes in, unless the decoder does, and combines what comes out."""

    def __init__(self, scale: float, *, repeats: bool) -> None:
        super().__init__()
        self.scale, self.repeats = scale, repeats
        self.batch = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        first = args[0] if args else kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]
        self.batch = first.shape[0]
        return twice((args, kwargs), self.batch) if self.repeats else (args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.combined(output[0]), *output[1:])
        return type(output)(sample=self.combined(output.sample))

    def combined(self, both: Tensor) -> Tensor:
        ordinary, changed = both.chunk(2)
        return ordinary + self.scale * (changed - ordinary)


class _Repeat(ModelHook):
    """On a block of the decoder: repeats what has not been repeated yet."""

    def __init__(self, outer: _Combine) -> None:
        super().__init__()
        self.outer = outer

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        return twice((args, kwargs), self.outer.batch)


Forward = Callable[[Tensor], object]
"""Runs the denoiser on latents `(samples, channels, h, w)` as the current step does, text and all, unguided."""


class LatentGuidance(AbstractContextManager["LatentGuidance"]):
    """Changes the latents of a stock pipeline's loop ahead of every step, while the block runs.

    The loop keeps its latents to itself, so it is told where they are (`follow`) when they are made and after every
    step; the denoiser is then met with the changed ones, and so is the scheduler.

    Args:
        pipe: The pipeline.
        denoiser: Its UNet.
        update: Gets the latents, the noise level and a `Forward`, and gives the latents to go on with.
    """

    def __init__(
        self, pipe: Pipeline, denoiser: nn.Module, update: Callable[[Tensor, Tensor, Forward], Tensor]
    ) -> None:
        self.pipe, self.denoiser, self.update = pipe, paths.uncompiled(denoiser), update
        self.latents: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LatentGuidance:
        """Put the hook in place."""
        with ExitStack() as stack:
            stack.enter_context(hooks.hooked(self.denoiser, _Update(self), _GUIDANCE))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        """Take it off again."""
        self._stack.close()

    def follow(self, latents: Tensor) -> None:
        """Say which tensor the loop goes on with."""
        self.latents = latents


class _Update(ModelHook):
    """On the denoiser: changes the loop's latents, and what it is given of them."""

    def __init__(self, guidance: LatentGuidance) -> None:
        super().__init__()
        self.guidance, self.inside = guidance, False

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        latents = self.guidance.latents
        if self.inside or latents is None:
            return args, kwargs
        sample, t, *rest = args
        count, scale = latents.shape[0], self.guidance.pipe.scheduler.scale_model_input
        own_args, own_kwargs = last((tuple(rest), kwargs), sample.shape[0], count)
        self.inside = True
        try:
            forward = lambda z: module(scale(z, t), t, *own_args, **own_kwargs)  # noqa: E731
            changed = self.guidance.update(latents, t, forward)
        finally:
            self.inside = False
        # In place: the loop hands this tensor to the scheduler.
        latents.copy_(changed)
        given = scale(torch.cat([changed] * (sample.shape[0] // count)), t)
        return (given, t, *rest), kwargs


def last(value: Any, batch: int, count: int) -> Any:
    """The last `count` rows of every tensor of `batch` rows in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value[-count:] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: last(item, batch, count) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(last(item, batch, count) for item in value)
    return value
