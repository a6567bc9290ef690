"""Types of prediction of denoisers, and the noising of their training: one small class for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

TIMESTEPS = 1000
"""Number of timesteps that denoisers are trained on. In flow matching they run from 0 to this one, which is
pure noise."""


class Parametrisation(ABC):
    """A way to noise clean latents, and a type of prediction.

    Latents, noise and predictions are `(batch, channels, h, w)`; noise levels `t` are `(batch,)`.
    """

    name: ClassVar[str]
    """Name of the prediction type in diffusers' schedulers."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mix clean latents with standard normal noise, as in training."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute the target: what a perfect denoiser predicts for `noised(clean, noise, t)`."""

    @abstractmethod
    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute the clean latents that a prediction implies.

        Args:
            prediction: What the denoiser predicted.
            x_t: Latents noised as in training, not as a scheduler that works in sigmas scales them.
            t: Noise levels.
        """


class Diffusion(Parametrisation):
    r"""Variance-preserving noise: $x_t = \sqrt{a_t} x + \sqrt{1 - a_t} \epsilon$.

    Args:
        cumulative: $a_t$ of every noise level, `(levels,)`.
    """

    def __init__(self, cumulative: Tensor) -> None:
        self.cumulative = cumulative

    def shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the shares of signal and noise at timesteps, `(batch, 1, 1, 1)` each, on a tensor's device."""
        kept = self.cumulative.to(like.device)[t.to(like.device).long()].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See `Parametrisation.noised`."""
        signal, spread = self.shares(t, clean)
        return (signal * clean + spread * noise).to(clean.dtype)


class Epsilon(Diffusion):
    r"""The noise $\epsilon$ itself."""

    name = "epsilon"

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        r"""$\epsilon$."""
        return noise

    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""$(x_t - \sqrt{1 - a_t} \epsilon) / \sqrt{a_t}$."""
        signal, spread = self.shares(t, x_t)
        return (x_t - spread * prediction) / signal


class V(Diffusion):
    r"""The velocity $v = \sqrt{a_t} \epsilon - \sqrt{1 - a_t} x$."""

    name = "v_prediction"

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """$v$."""
        signal, spread = self.shares(t, clean)
        return (signal * noise - spread * clean).to(clean.dtype)

    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""$\sqrt{a_t} x_t - \sqrt{1 - a_t} v$."""
        signal, spread = self.shares(t, x_t)
        return signal * x_t - spread * prediction


class Sample(Diffusion):
    """The clean latent itself."""

    name = "sample"

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """$x$."""
        return clean

    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction."""
        return prediction


class Flow(Parametrisation):
    r"""Flow matching: $x_t = (1 - s) x + s \epsilon$ with $s = t / 1000$, and the velocity $v = \epsilon - x$."""

    name = "flow_prediction"

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See `Parametrisation.noised`."""
        share = self.share(t, clean)
        return ((1 - share) * clean + share * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """$v$."""
        return noise - clean

    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """$x_t - s v$."""
        return (x_t - self.share(t, x_t) * prediction).to(x_t.dtype)

    def share(self, t: Tensor, like: Tensor) -> Tensor:
        """Share of the noise $s$ at some levels, `(batch, 1, 1, 1)`, on the device of a tensor.

        In float32 at least: half precision would round neighbouring levels to the same one.
        """
        return t.to(like.device, torch.promote_types(like.dtype, torch.float32)).view(-1, 1, 1, 1) / TIMESTEPS


PREDICTIONS: dict[str, type[Diffusion]] = {kind.name: kind for kind in (Epsilon, V, Sample)}
"""The ways of models whose noise preserves variance, by the name that their schedulers give them."""
