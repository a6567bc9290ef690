"""Images that a one-step generator draws, as a source of training states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning
from erasure.text.encodings import Reader
from erasure.training.states import Scene, States, StateSource, stable_seed
from erasure.training.student import Student

SEEDS = 2**20
"""Number of different initial noises per prompt, more than a training ever uses."""


class OneStepGenerator(StateSource):
    """Images that a network draws from noise in one step at a fixed timestep.

    The index of a state determines its initial noise, the timestep to which the image is noised, and the noise added.

    Args:
        backbone: Model whose denoiser is the stock model, and is the generator while `student` is active.
        scenes: Prompts of the images.
        prompts: Encodes the prompts.
        student: The generator.
        level: Timestep of the one step.
        levels: First timestep (inclusive) and last timestep (exclusive) to which images are noised.
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
        """See `StateSource.spread`; timesteps are random, so those of any indices are spread."""
        return torch.arange(count)

    def scene_of(self, index: Tensor) -> list[Scene]:
        """Give the scenes of states, by index."""
        return [self.scenes[number] for number in (index // SEEDS).tolist()]

    def draw(self, prompts: Sequence[str | None], numbers: Sequence[int]) -> Tensor:
        """Draw clean latents `(states, channels, h, w)` float32, differentiable in the student's tensors.

        Args:
            prompts: Prompts of the images.
            numbers: Indices of the initial noise.
        """
        return self.draw_as(self.student, prompts, numbers)

    def draw_as(self, student: Student | None, prompts: Sequence[str | None], numbers: Sequence[int]) -> Tensor:
        """Draw clean latents as `draw` does, with another student; with the stock model when it is `None`."""
        noise = self.backbone.noise([stable_seed(self.seed, "generator", number) for number in numbers])
        with nullcontext() if student is None else student.active():
            return one_step(self.backbone, noise, self.level, self.prompts(prompts))

    def noised(self, clean: Tensor, numbers: Sequence[int], purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """Noise images: give the noised latents, their timesteps `(states,)`, and the noise.

        Args:
            clean: Clean latents.
            numbers: Indices of their states.
            purpose: Part of the seed: another purpose gives other timesteps and noise.
        """
        backbone, (low, high) = self.backbone, self.levels
        seeds = [stable_seed(self.seed, purpose, number) for number in numbers]
        t = torch.tensor([low + seed % (high - low) for seed in seeds], device=clean.device)
        noise = backbone.noise([stable_seed(seed, "mixed in") for seed in seeds]).to(clean.dtype)
        return backbone.parametrisation.noised(clean, noise, t), t, noise

    @torch.no_grad()
    def take(self, index: Tensor) -> States:
        """See `StateSource.take`: noised images, with the stock model's predictions for their prompts."""
        named, numbers = self.scene_of(index), index.tolist()
        x, t, _ = self.noised(self.draw([each.prompt for each in named], numbers), numbers, "taken")
        x = x.to(self.backbone.dtype)

        def encoded(prompts: Sequence[str | None]) -> Tensor:
            return self.backbone.predict(x, t, self.prompts(prompts))

        own = encoded([each.prompt for each in named])
        asks = [encoded(prompts) for prompts in zip(*(each.asks for each in named), strict=True)]
        asked = torch.stack(asks, 1) if asks else own.new_zeros(len(own), 0, *own.shape[1:])
        scene = (index // SEEDS).to(x.device)
        return States(x, t, scene, own, None, asked, torch.ones(len(x), device=x.device))


def one_step(backbone: Backbone, noise: Tensor, level: int, conditioning: Conditioning) -> Tensor:
    """Predict clean latents, in float32, from pure noise at one timestep.

    Args:
        backbone: Model whose denoiser predicts.
        noise: Noise of standard deviation 1, as pipelines pass it to the denoiser.
        level: Timestep that the denoiser reads.
        conditioning: Conditioning, one row per noise.
    """
    t = torch.full((len(noise),), level, device=noise.device)
    return backbone.parametrisation.clean(backbone.predict(noise, t, conditioning).float(), noise.float(), t)
