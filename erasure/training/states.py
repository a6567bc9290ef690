"""Training states: noised latents with the stock model's predictions for them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone


class Scene(NamedTuple):
    """A prompt to sample, and the prompts of its predictions."""

    prompt: str | None
    """Prompt to sample; `None` is the pipeline's null conditioning."""
    asks: tuple[str | None, ...] = ()
    """Other prompts for which the teacher predicts at every state, `None` for the null conditioning; as many in all
    scenes of a source."""
    instead: str | None = None
    """Prompt that the student is trained on at these states; `prompt` itself when `None`."""

    @property
    def learned(self) -> str | None:
        """Prompt that the student is trained on."""
        return self.prompt if self.instead is None else self.instead


class States(NamedTuple):
    """Noised latents with the teacher's predictions for them."""

    x: Tensor
    """Noised latents as the denoiser reads them, `(states, channels, h, w)`."""
    t: Tensor
    """Timesteps, `(states,)`."""
    scene: Tensor
    """Index of each state's scene, `(states,)`."""
    own: Tensor
    """Prediction for the scene's prompt, shaped as `x`."""
    null: Tensor | None
    """Prediction for the null conditioning, shaped as `x`; `None` where no target needs it."""
    asked: Tensor
    """Predictions for the scene's other prompts, `(states, asks, channels, h, w)`."""
    guidance: Tensor
    """Guidance scale that the teacher read in all of these predictions, `(states,)`; 1 for models without guidance
    input."""
    truth: Tensor | None = None
    """Target of a perfect denoiser, shaped as `x`; `None` where no clean latent is known."""

    @property
    def unprompted(self) -> Tensor:
        """Prediction for the null conditioning, which must be there."""
        assert self.null is not None, "no target was said to need it"
        return self.null

    @property
    def noised(self) -> Tensor:
        """Target of a perfect denoiser, which must be there."""
        assert self.truth is not None, "only noised images have a clean latent"
        return self.truth

    @classmethod
    def cat(cls, parts: Sequence[States]) -> States:
        """Concatenate states that have the same fields."""
        every = [part.parts() for part in parts]
        return parts[0]._replace(**{name: torch.cat([part[name] for part in every]) for name in every[0]})

    def parts(self) -> dict[str, Tensor]:
        """Give the fields that are not `None`, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}

    def rows(self, index: Tensor | slice) -> States:
        """Select states."""
        return self._replace(**{name: part[index] for name, part in self.parts().items()})

    def to(self, device: torch.device) -> States:
        """Move all tensors to a device."""
        return self._replace(**{name: part.to(device, non_blocking=True) for name, part in self.parts().items()})


class StateSource(ABC):
    """Training states by index: those of the first scene, then those of the next.

    Args:
        scenes: Prompts of the states.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = list(scenes)

    def __len__(self) -> int:
        """Number of states."""
        return len(self.scenes) * self.per_scene

    @property
    @abstractmethod
    def per_scene(self) -> int:
        """Number of states of each scene."""

    @abstractmethod
    def spread(self, count: int) -> Tensor:
        """Give the indices within a scene of `count` states at evenly spaced timesteps, `(count,)`."""

    @abstractmethod
    def take(self, index: Tensor) -> States:
        """Give states by index `(states,)`, on the denoiser's device."""

    def of(self, states: States) -> list[Scene]:
        """Give the scenes of states."""
        return [self.scenes[index] for index in states.scene.tolist()]


def session_of(backbone: Backbone) -> dict[str, object]:
    """Give a backbone's image size and prompt length, as plain data."""
    return {
        "latents": list(backbone.latents.shape()),
        "tokens": {tower.component: tower.max_length for tower in backbone.towers},
    }


def stable_seed(*parts: object) -> int:
    """Make a 63-bit seed from any values, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draw(total: int, count: int, *seed: object) -> Tensor:
    """Draw `count` integers below `total` with replacement, `(count,)`; the same for the same seed."""
    return torch.randint(total, (count,), generator=torch.Generator().manual_seed(stable_seed(*seed)))


Mode = Literal["buffer", "online", "images"]
"""Where training states come from, see `TrainedStrategy.states`."""
