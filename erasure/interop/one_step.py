"""A one-step sampler at one timestep, which diffusers treats as the DDIM that it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from erasure.errors import OneStepWarning, UnsupportedModelError
from erasure.interop.protocols import Scheduler


class OneStepScheduler(DDIMScheduler):
    """DDIM from one timestep directly to clean latents, whatever number of steps a call asks for.

    It is saved as a stock scheduler of this one level; `replaced` and `retired` are in no file.
    """

    replaced: Scheduler
    """The pipeline's own scheduler, which is restored later."""
    retired = False
    """Whether the erasure of the generator has been removed."""

    @classmethod
    def in_place_of(cls, scheduler: Scheduler, level: int) -> OneStepScheduler:
        """Make a one-step sampler with a scheduler's noise schedule.

        Args:
            scheduler: The pipeline's own scheduler.
            level: Timestep of the step.
        """
        # A schedule that ends at the level: pipelines change the offset of one that begins there to 1.
        made: OneStepScheduler = cls.from_config(
            scheduler.config, trained_betas=scheduler.betas[: level + 1].tolist(), num_train_timesteps=level + 1,
            timestep_spacing="trailing", set_alpha_to_one=True, rescale_betas_zero_snr=False, clip_sample=False,
            thresholding=False,
        )  # fmt: skip
        made.replaced = scheduler
        made.set_timesteps(1)
        return made

    @property
    def level(self) -> int:
        """Noise level of the step."""
        return int(self.config.num_train_timesteps) - 1

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare the one step.

        Args:
            num_inference_steps: Number of steps of the call; a number other than 1 gives a warning.
            device: Device of the timesteps.

        Raises:
            UnsupportedModelError: The erasure has been taken off through another pipeline.
        """
        if self.retired:
            raise UnsupportedModelError(
                "this sampler of one step belongs to an erasure that was taken off through another pipeline: set "
                "pipe.scheduler = pipe.scheduler.replaced, which is this pipeline's own"
            )
        if num_inference_steps != 1:
            warnings.warn(
                f"a one-step generator is attached: it draws in 1 step, not in {num_inference_steps}. Pass "
                "num_inference_steps=1",
                OneStepWarning,
                stacklevel=2,
            )
        super().set_timesteps(1, device)


# Pipelines write the name and module of a scheduler's class into their files, for stock code to find.
OneStepScheduler.__name__ = OneStepScheduler.__qualname__ = DDIMScheduler.__name__
OneStepScheduler.__module__ = DDIMScheduler.__module__


def own_scheduler(pipe: DiffusionPipeline) -> Scheduler:
    """The scheduler of a pipeline without erasures."""
    scheduler = pipe.scheduler
    return scheduler.replaced if isinstance(scheduler, OneStepScheduler) else scheduler


@contextmanager
def sampled_once(pipe: DiffusionPipeline, level: int) -> Iterator[None]:
    """Let a pipeline sample in one step at a timestep inside of the block."""
    before = pipe.scheduler
    pipe.scheduler = OneStepScheduler.in_place_of(before, level)
    try:
        yield
    finally:
        pipe.scheduler = before
