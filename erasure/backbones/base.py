"""The protocol of a model family. Strategies ask it and never look at the family's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.backbones.sites import AttentionSite, attention_sites
from erasure.backbones.towers import TextTower
from erasure.interop.protocols import Denoiser, Scheduler

Prediction = Literal["epsilon", "v_prediction", "flow", "sample"]


class EntryLayer(NamedTuple):
    """A linear layer through which text features enter the denoiser: what closed-form methods edit."""

    key: str
    """`component/module.path`."""
    module: nn.Linear
    source: Literal["tokens", "pooled"] = "tokens"
    """Which part of the conditioning it reads."""


class Conditioning(NamedTuple):
    """What the denoiser is told about a batch of prompts."""

    tokens: Tensor
    """`(batch, tokens, dim)`."""
    pooled: Tensor | None = None
    """`(batch, dim)`, for families that use it."""


class Backbone(ABC):
    """One pipeline seen through its family.

    Args:
        pipe: The pipeline; its modules are used in place.
    """

    family: ClassVar[str]
    denoiser_component: ClassVar[str]

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe

    @classmethod
    @abstractmethod
    def matches(cls, pipe: DiffusionPipeline) -> bool:
        """Whether a pipeline is of this family."""

    @property
    @abstractmethod
    def towers(self) -> list[TextTower]:
        """The text encoders, in the order in which the pipeline uses them."""

    @property
    def denoiser(self) -> Denoiser:
        """The network that denoises, a module."""
        return getattr(self.pipe, self.denoiser_component)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        return next(self.denoiser.parameters()).dtype

    def attention_sites(self) -> list[AttentionSite]:
        """Every attention layer of the denoiser in order of execution."""
        return attention_sites(self.denoiser)

    @abstractmethod
    def entry_layers(self) -> list[EntryLayer]:
        """The linear layers through which text enters the denoiser."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline does; differentiable in the text encoders' weights."""

    @property
    @abstractmethod
    def prediction(self) -> Prediction:
        """What the denoiser predicts."""

    @abstractmethod
    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction at noise level `t` implies.

        Args:
            prediction: What the denoiser predicted, shaped as `x_t`.
            x_t: `(batch, channels, h, w)`, noised as in training (not as a scheduler that works in sigmas scales it).
            t: `(batch,)`.
        """

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents `(batch, channels, h, w)` at the noise levels `t` `(batch,)`, as in training."""

    @abstractmethod
    def training_target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect denoiser predicts for `noised(clean, noise, t)`."""

    @abstractmethod
    def rollout_scheduler(self) -> Scheduler:
        """A new deterministic first-order sampler of the model's noise schedule.

        It keeps nothing between steps, so rows of a batch may end at any of them.
        """

    @abstractmethod
    def timesteps(self, steps: int) -> Tensor:
        """The noise levels of a sampling run, highest first."""

    @abstractmethod
    def noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """Initial latents, one seed each, drawn on the CPU in float32: `(seeds, channels, h, w)`."""

    @abstractmethod
    def model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Latents of a sampling run as the denoiser wants them: some schedulers carry them at another scale."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward pass of the denoiser, shaped as `x_t`; differentiable."""

    @abstractmethod
    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """One step of the pipeline's scheduler from `t` (one level for the whole batch) to the next."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `(batch, 3, height, width)` in 0-1 of clean latents."""
