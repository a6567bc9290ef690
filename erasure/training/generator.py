"""Images that a one-step generator draws, as a source of training states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning
from erasure.text.encodings import Reader
from erasure.training.states import Scene, States, StateSource, stable_seed
from erasure.training.student import Student

SEEDS = 2**20
"""Noises that a scene is drawn from: more than a training ever asks for."""


class OneStepGenerator(StateSource):
    """Images drawn in one step by a network at a fixed noise level, from nothing but noise.

    From the number of a state follow the noise that it is drawn from, the level that it is noised to, and the noise
    that is mixed in.

    Args:
        backbone: Its denoiser is the stock model, and draws as the student while that is active.
        scenes: What is drawn.
        prompts: Encodings of their prompts.
        student: The generator.
        level: Noise level that it is told.
        levels: Lowest noise level that images are noised to, and the first that is too high.
        seed: Seeds all noise.
    """

    def __init__(
        self, backbone: Backbone, scenes: Sequence[Scene], prompts: Reader, student: Student, level: int,
        levels: tuple[int, int], seed: int,
    ) -> None:  # fmt: skip
        super().__init__(scenes)
        self.backbone, self.prompts, self.student = backbone, prompts, student
        self.level, self.levels, self.seed = level, levels, seed

    @property
    def per_scene(self) -> int:
        """See `StateSource.per_scene`."""
        return SEEDS

    def spread(self, count: int) -> Tensor:
        """See `StateSource.spread`; levels are drawn, so those of any numbers are spread."""
        return torch.arange(count)

    def scene_of(self, index: Tensor) -> list[Scene]:
        """The scenes of states by number."""
        return [self.scenes[number] for number in (index // SEEDS).tolist()]

    def draw(self, prompts: Sequence[str | None], numbers: Sequence[int]) -> Tensor:
        """Clean latents `(states, channels, h, w)` in float32, differentiable in the student's tensors.

        Args:
            prompts: What is drawn.
            numbers: Say from which noise.
        """
        noise = self.backbone.noise([stable_seed(self.seed, "generator", number) for number in numbers])
        with self.student.active():
            return one_step(self.backbone, noise, self.level, self.prompts(prompts))

    def noised(self, clean: Tensor, numbers: Sequence[int], purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """Images mixed with fresh noise: the mixture, its levels `(states,)`, and the noise.

        Args:
            clean: Images.
            numbers: Of their states.
            purpose: Another one gives other levels and noise.
        """
        backbone, (low, high) = self.backbone, self.levels
        seeds = [stable_seed(self.seed, purpose, number) for number in numbers]
        t = torch.tensor([low + seed % (high - low) for seed in seeds], device=clean.device)
        noise = backbone.noise([stable_seed(seed, "mixed in") for seed in seeds]).to(clean.dtype)
        return backbone.parametrisation.noised(clean, noise, t), t, noise

    @torch.no_grad()
    def take(self, index: Tensor) -> States:
        """See `StateSource.take`: noised images, and what the stock model predicts there for their prompts."""
        named, numbers = self.scene_of(index), index.tolist()
        x, t, _ = self.noised(self.draw([each.prompt for each in named], numbers), numbers, "taken")
        x = x.to(self.backbone.dtype)

        def said(prompts: Sequence[str | None]) -> Tensor:
            return self.backbone.predict(x, t, self.prompts(prompts))

        own = said([each.prompt for each in named])
        asks = [said(prompts) for prompts in zip(*(each.asks for each in named), strict=True)]
        asked = torch.stack(asks, 1) if asks else own.new_zeros(len(own), 0, *own.shape[1:])
        scene = (index // SEEDS).to(x.device)
        return States(x, t, scene, own, None, asked, torch.ones(len(x), device=x.device))


def one_step(backbone: Backbone, noise: Tensor, level: int, told: Conditioning) -> Tensor:
    """Clean latents in float32 that a denoiser predicts at one noise level, from noise alone.

    Args:
        backbone: Of the denoiser.
        noise: As pipelines hand it to the denoiser, of standard deviation 1.
        level: What the denoiser is told.
        told: Conditioning of as many prompts.
    """
    t = torch.full((len(noise),), level, device=noise.device)
    return backbone.parametrisation.clean(backbone.predict(noise, t, told).float(), noise.float(), t)
