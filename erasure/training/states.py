"""What a student trains on: noisy latents, and what the stock model predicts there."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone


class Scene(NamedTuple):
    """A prompt to roll out."""

    prompt: str | None
    """`None` rolls out what the pipeline tells the denoiser where no prompt is given."""
    asks: tuple[str | None, ...] = ()
    """Other prompts that the teacher is asked at every state, `None` for no prompt; as many in all scenes of one
    source."""
    instead: str | None = None
    """Prompt that the student learns at these states in the place of `prompt`."""

    @property
    def learned(self) -> str | None:
        """Prompt that the student learns."""
        return self.prompt if self.instead is None else self.instead


class States(NamedTuple):
    """Noisy latents and what the teacher predicts there."""

    x: Tensor
    """`(states, channels, h, w)`, as the denoiser wants them."""
    t: Tensor
    """`(states,)` noise levels."""
    scene: Tensor
    """`(states,)` index of each one's scene."""
    own: Tensor
    """Prediction for the scene's prompt, shaped as `x`."""
    null: Tensor | None
    """Prediction where no prompt is given, shaped as `x`; `None` where no target needs it."""
    asked: Tensor
    """For the prompts asked besides, `(states, asks, channels, h, w)`."""
    guidance: Tensor
    """`(states,)` scale that the teacher was told for all of these predictions; 1 where a model is not told any."""
    truth: Tensor | None = None
    """What a perfect denoiser would predict, shaped as `x`; `None` where no clean latent is known."""

    @property
    def unprompted(self) -> Tensor:
        """Prediction where no prompt is given, of states whose source asks for it."""
        assert self.null is not None, "no target was said to need it"
        return self.null

    @property
    def noised(self) -> Tensor:
        """What a perfect denoiser would predict, of states whose clean latent is known."""
        assert self.truth is not None, "only noised images have a clean latent"
        return self.truth

    @classmethod
    def cat(cls, parts: Sequence[States]) -> States:
        """All of some, one after the other; they have the same parts."""
        every = [part.parts() for part in parts]
        return parts[0]._replace(**{name: torch.cat([part[name] for part in every]) for name in every[0]})

    def parts(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}

    def rows(self, index: Tensor | slice) -> States:
        """Some of them."""
        return self._replace(**{name: part[index] for name, part in self.parts().items()})

    def to(self, device: torch.device) -> States:
        """On a device."""
        return self._replace(**{name: part.to(device, non_blocking=True) for name, part in self.parts().items()})


class StateSource(ABC):
    """Training states by number: those of the first scene, then those of the next.

    Args:
        scenes: What prompts the states belong to.
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
        """Numbers within a scene of `count` states at noise levels that are evenly apart, `(count,)`."""

    @abstractmethod
    def take(self, index: Tensor) -> States:
        """States by number `(states,)`, on the denoiser's device."""

    def of(self, states: States) -> list[Scene]:
        """The scenes of states."""
        return [self.scenes[index] for index in states.scene.tolist()]


def session_of(backbone: Backbone) -> dict[str, object]:
    """Size and text length that a backbone draws and reads with, plain data."""
    return {
        "latents": list(backbone.latents.shape()),
        "tokens": {tower.component: tower.max_length for tower in backbone.towers},
    }


def stable_seed(*parts: object) -> int:
    """A seed of 63 bits made of anything, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draw(total: int, count: int, *seed: object) -> Tensor:
    """`count` numbers below `total`, with replacement, `(count,)`; the same for the same seed."""
    return torch.randint(total, (count,), generator=torch.Generator().manual_seed(stable_seed(*seed)))


Mode = Literal["buffer", "online", "images"]
"""Where states come from."""
