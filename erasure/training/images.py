"""Training states made from images of the stock model, noised to any timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from erasure.training.states import States, stable_seed
from erasure.training.trajectories import RolledOut, TrajectoryBuffer, chunks

LEVELS = 500
"""Number of timesteps to which images are noised, those of a schedule of so many steps."""
Kept = Callable[[int, Callable[[], Tensor]], Tensor]
"""Gives clean latents by the index of their chunk: cached ones, or those that the function computes."""


class NoisedImages(RolledOut):
    """Images that the stock model draws for the scenes, with new noise added for every state.

    The teacher predicts whenever a state is taken, because one image gives many states. The states of an image are
    those at its timesteps, highest first; the added noise depends on the state's index.

    Args:
        *args: See `RolledOut`.
        asks_null: Whether targets need the prediction for the empty prompt.
        stored: Filled buffers; images at which their trajectories end are not drawn again.
        gather: Sums a tensor over all processes.
        share: Index of this process, and number of processes.
    """

    def __init__(
        self, *args: Any, asks_null: bool = True, stored: Sequence[TrajectoryBuffer] = (),
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor, share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        super().__init__(*args)
        self.asks_null, self.stored, self.gather, self.share = asks_null, stored, gather, share
        self.levels = self.backbone.timesteps(LEVELS)
        self.clean: Tensor | None = None

    @property
    def per_scene(self) -> int:
        """See `StateSource.per_scene`."""
        return self.rollout.seeds * LEVELS

    def spread(self, count: int) -> Tensor:
        """See `StateSource.spread`; the indices are those of the first image."""
        return torch.linspace(0, LEVELS - 1, count).long()

    def fill(self, kept: Kept = lambda _number, make: make()) -> None:
        """Draw all images, chunk by chunk; several processes share the chunks.

        Args:
            kept: Gives cached chunks, and caches new ones.
        """
        clean = torch.zeros(self.trajectories, *self.backbone.latents.shape(), dtype=self.backbone.dtype)
        for number, chunk in chunks(self.trajectories, self.share):
            clean[chunk.start : chunk.stop] = kept(number, partial(self.drawn, chunk)).cpu()
        self.clean = self.gather(clean.to(self.backbone.device))

    @torch.no_grad()
    def drawn(self, trajectories: Sequence[int]) -> Tensor:
        """Give the final latents of trajectories, `(trajectories, channels, h, w)`, and sample what is not stored."""
        seeds = {trajectory: self.noise_seed(trajectory) for trajectory in trajectories}
        found: dict[int, Tensor] = {}
        for buffer in self.stored:
            found |= buffer.finished(list(seeds.values()), self.rollout)
        absent = [trajectory for trajectory, seed in seeds.items() if seed not in found]
        if absent:
            found |= zip([seeds[trajectory] for trajectory in absent], self.sampled(absent), strict=True)
        return torch.stack([found[seed] for seed in seeds.values()])

    def sampled(self, trajectories: Sequence[int]) -> Tensor:
        """Sample trajectories together and give their final latents, `(trajectories, channels, h, w)`."""
        backbone = self.backbone
        x = backbone.noise([self.noise_seed(trajectory) for trajectory in trajectories])
        scenes = [trajectory // self.rollout.seeds for trajectory in trajectories]
        for t in backbone.timesteps(self.rollout.steps):
            predicted = self.predicted(backbone.model_input(x, t), t, scenes)
            x = backbone.step(predicted.guided(backbone, self.rollout.guidance), t, x)
        return x

    def mixed(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the clean latents of states, the noise added to them, and the timesteps."""
        assert self.clean is not None, "draw the images first"
        image, level = index // LEVELS, index % LEVELS
        t = self.levels.to(self.backbone.device)[level.to(self.backbone.device)]
        noise = self.backbone.noise([stable_seed(self.seed, "noise", number) for number in index.tolist()])
        return self.clean[image.to(self.clean.device)], noise, t

    @torch.no_grad()
    def take(self, index: Tensor) -> States:
        """See `StateSource.take`."""
        clean, noise, t = self.mixed(index)
        way, numbers, image = self.backbone.parametrisation, index.tolist(), index // LEVELS
        x, truth = way.noised(clean, noise, t), way.target(clean, noise, t)
        scene = image // self.rollout.seeds
        named = [self.scenes[number] for number in scene.tolist()]
        scales = [self.kept_guidance(*divmod(number, LEVELS)) for number in numbers]
        guidance = torch.tensor(scales, device=x.device)
        own = self.asked(x, t, [each.prompt for each in named], guidance)
        null = self.asked(x, t, [None] * len(x), guidance) if self.asks_null else None
        return States(x, t, scene.to(x.device), own, null, self.answers(x, t, named, guidance), guidance, truth)
