"""The base of families with a transformer: flow matching, timesteps that depend on the image's size, Euler steps."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from erasure.backbones.base import Backbone, EntryLayer
from erasure.backbones.parametrisation import Flow
from erasure.errors import UnsupportedModelError
from erasure.interop import paths

PATCH = 2
"""Number of latent values along a side of a transformer token."""


class FlowMatchingBackbone(Backbone):
    """Any pipeline with a transformer that predicts a velocity, text encoders and a VAE."""

    denoiser_component = "transformer"
    network: ClassVar[type[nn.Module]]
    """Class of the transformer."""
    required: ClassVar[tuple[str, ...]]
    """Text encoders without which the pipeline encodes no prompt."""
    even_levels: ClassVar[bool]
    """Whether the pipeline passes evenly spaced sigmas from 1 down to 1 / steps to its scheduler; otherwise the
    scheduler chooses them."""

    def __init__(
        self, pipe: DiffusionPipeline, *, size: tuple[int, int] | None = None, length: int | None = None
    ) -> None:
        super().__init__(pipe, size=size, length=length)
        left_out = [name for name in self.required if not isinstance(pipe.components.get(name), nn.Module)]
        if left_out:
            raise UnsupportedModelError(
                f"this {type(pipe).__name__} has no {left_out[0]}, and a model of {self.family} reads no prompt "
                f"without it: load the pipeline with {' and '.join(self.required)}"
            )

    @classmethod
    def matches(cls, pipe: DiffusionPipeline) -> bool:
        """Whether the pipeline has a transformer of the family's class."""
        transformer = pipe.components.get("transformer")
        return isinstance(transformer, nn.Module) and isinstance(paths.uncompiled(transformer), cls.network)

    def entry_layers(self) -> list[EntryLayer]:
        """The layer that reads tokens, and the first of those that read the pooled vectors."""
        return [
            self.entry("context_embedder", "tokens"),
            self.entry("time_text_embed.text_embedder.linear_1", "pooled"),
        ]

    @property
    def parametrisation(self) -> Flow:
        """The velocity of flow matching.

        Raises:
            UnsupportedModelError: The pipeline has a scheduler for models that predict something else.
        """
        scheduler = self.pipe.scheduler
        config = scheduler.config
        is_flow = (
            type(scheduler).__name__.startswith("FlowMatch")
            or config.get("prediction_type") == Flow.name
            or config.get("use_flow_sigmas")
        )
        if not is_flow:
            raise UnsupportedModelError(
                f"the transformer predicts velocities, which {type(scheduler).__name__} does not sample with: set "
                "pipe.scheduler to FlowMatchEulerDiscreteScheduler, or to another with use_flow_sigmas=True"
            )
        return Flow()

    def rollout_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Euler's method without added noise, at the levels that the model was made for."""
        config = self.pipe.scheduler.config
        return FlowMatchEulerDiscreteScheduler.from_config(
            config, shift=config.get("shift") or config.get("flow_shift") or 1.0, stochastic_sampling=False,
            use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
        )  # fmt: skip

    def timesteps(self, steps: int) -> Tensor:
        """Sets the scheduler to `steps` steps for a picture of the session's size, as the pipeline does."""
        scheduler = self.pipe.scheduler
        options: dict[str, object] = {"num_inference_steps": steps}
        if self.even_levels and not scheduler.config.get("use_flow_sigmas"):
            options = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if self.even_levels or scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self.shift
        scheduler.set_timesteps(device=self.device, **options)
        return scheduler.timesteps

    @property
    def shift(self) -> float:
        """Shift of the timesteps towards noise: a linear function of the number of an image's tokens."""
        _, rows, columns = self.latents.shape()
        config = self.pipe.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        return (rows // PATCH) * (columns // PATCH) * slope + (low - slope * few)

    def model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the latents, which have one scale everywhere."""
        return x_t

    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """One step of the pipeline's scheduler; Euler's looks its place up by level and counts no calls."""
        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
            return scheduler.step(prediction, t, x_t).prev_sample
        at = scheduler.index_for_timestep(t)
        away = scheduler.sigmas[at + 1] - scheduler.sigmas[at]
        return (x_t.to(torch.float32) + away * prediction).to(prediction.dtype)
