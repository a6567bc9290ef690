"""Guidance by a second branch of the denoiser, which runs in the same batch; only one prediction is returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from erasure.backbones import AttentionSite, Backbone
from erasure.carriers.calls import LATENTS, NamedArguments, latents_of, measured, of_rows, twice
from erasure.interop import hooks, paths
from erasure.interop.protocols import Arguments

_GUIDANCE = "erasure_branch_guidance"
TRUNK = ("down_blocks.", "mid_block.")
"""Parts of a UNet that run before the decoder."""


def can_share_trunk(denoiser: nn.Module, changed: Sequence[AttentionSite]) -> bool:
    """Whether both branches are equal before the decoder: a UNet in which no layer before it is changed."""
    is_unet = isinstance(paths.uncompiled(denoiser), UNet2DConditionModel)
    return is_unet and not any(site.name.startswith(TRUNK) for site in changed)


class BranchGuidance(AbstractContextManager["BranchGuidance"]):
    """`e = e_ordinary + scale (e_changed - e_ordinary)` in place of the denoiser's prediction, while the block runs.

    For the caller the denoiser has its usual shapes. Inside, rows are doubled: ordinary rows, then rows that an
    `AttentionController` with two branches changes. With a shared trunk they are doubled only where the decoder
    begins, so the blocks before it run once, residuals of a ControlNet included.

    Args:
        denoiser: UNet or transformer.
        scale: Guidance scale.
        shared_trunk: See `can_share_trunk`.
    """

    def __init__(self, denoiser: nn.Module, scale: float, *, shared_trunk: bool) -> None:
        self.denoiser, self.scale, self.shared_trunk = paths.uncompiled(denoiser), scale, shared_trunk
        self._stack = ExitStack()

    def __enter__(self) -> BranchGuidance:
        """Add the hooks."""
        with ExitStack() as stack:
            outer = _Combine(self.denoiser, self.scale, repeats=not self.shared_trunk)
            stack.enter_context(hooks.hooked(self.denoiser, outer, _GUIDANCE))
            if self.shared_trunk:
                blocks = cast(nn.ModuleList, self.denoiser.up_blocks)
                for block in blocks:
                    stack.enter_context(hooks.hooked(block, _Repeat(block, outer), _GUIDANCE))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        """Remove the hooks."""
        self._stack.close()


def has_branches(denoiser: nn.Module) -> bool:
    """Whether a `BranchGuidance` is active on a denoiser."""
    return isinstance(hooks.find_hook(denoiser, _GUIDANCE), _Combine)


class _Combine(NamedArguments):
    """Hook on the denoiser that doubles its input, unless the decoder does, and combines its outputs."""

    def __init__(self, denoiser: nn.Module, scale: float, *, repeats: bool) -> None:
        super().__init__(denoiser)
        self.scale, self.repeats = scale, repeats
        self.batch = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        arguments = self.by_name(args, kwargs)
        self.batch = len(latents_of(arguments))
        return self.as_called(of_rows(arguments, self.batch, twice), len(args)) if self.repeats else (args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.combined(output[0]), *output[1:])
        return type(output)(sample=self.combined(output.sample))

    def combined(self, both: Tensor) -> Tensor:
        ordinary, changed = both.chunk(2)
        return ordinary + self.scale * (changed - ordinary)


class _Repeat(NamedArguments):
    """Hook on a decoder block that doubles inputs that are not doubled yet."""

    def __init__(self, block: nn.Module, outer: _Combine) -> None:
        super().__init__(block)
        self.outer = outer

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        return self.as_called(of_rows(self.by_name(args, kwargs), self.outer.batch, twice), len(args))


Forward = Callable[[Tensor], object]
"""Runs the denoiser on latents in the loop's shape with the current step's conditioning, without guidance."""


class LatentGuidance(AbstractContextManager["LatentGuidance"]):
    """Changes the latents of a stock pipeline's loop before every step.

    The loop's latents are private to it, so `follow` is called when they are made and after every step. The denoiser
    and the scheduler then get the changed latents. A loop that calls the denoiser several times per step, for the
    prompt and for the negative one, has them changed before the first call.

    Args:
        backbone: Backbone of the pipeline.
        update: Gets the latents, the timestep and a `Forward`, and gives the new latents.
    """

    def __init__(self, backbone: Backbone, update: Callable[[Tensor, Tensor, Forward], Tensor]) -> None:
        self.backbone, self.update = backbone, update
        self.latents: Tensor | None = None
        self.due = False
        self._stack = ExitStack()

    def __enter__(self) -> LatentGuidance:
        """Put the hook in place."""
        with ExitStack() as stack:
            stack.enter_context(hooks.hooked(paths.uncompiled(self.backbone.denoiser), _Update(self), _GUIDANCE))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        """Take it off again."""
        self._stack.close()

    def follow(self, latents: Tensor) -> None:
        """Set the loop's latents at the beginning of a step."""
        self.latents, self.due = latents, True


class _Update(NamedArguments):
    """Hook on the denoiser that changes the loop's latents and its own input."""

    def __init__(self, guidance: LatentGuidance) -> None:
        super().__init__(paths.uncompiled(guidance.backbone.denoiser))
        self.guidance, self.inside = guidance, False

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        latents = self.guidance.latents
        if self.inside or latents is None:
            return args, kwargs
        arguments, positional = self.by_name(args, kwargs), len(args)
        given, t = latents_of(arguments), arguments["timestep"]
        name = next(name for name in LATENTS if name in arguments)
        count, scaled = latents.shape[0], self.guidance.backbone.model_input
        if self.guidance.due:
            own = of_rows(arguments, len(given), _last(count))

            def forward(z: Tensor) -> object:
                args, kwargs = self.as_called(own | {name: scaled(z, t)}, positional)
                return module(*args, **kwargs)

            self.inside = True
            try:
                with measured():
                    changed = self.guidance.update(latents, t, forward)
            finally:
                self.inside = False
            # In place: the loop hands this tensor to the scheduler.
            latents.copy_(changed)
            self.guidance.due = False
        given = scaled(torch.cat([latents] * (len(given) // count)), t)
        return self.as_called(arguments | {name: given}, positional)


def _last(count: int) -> Callable[[Tensor], Tensor]:
    """Give the last rows: behind those of the negative prompt are the prompt's own."""
    return lambda rows: rows[-count:]
