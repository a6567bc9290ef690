"""States of images that the model itself draws: noised to any level, as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from erasure.training.states import States, stable_seed
from erasure.training.trajectories import RolledOut, chunks

LEVELS = 500
"""Noise levels that images are noised to: those of a sampling run of so many steps."""
Kept = Callable[[int, Callable[[], Tensor]], Tensor]
"""Gives clean latents by the number of their chunk: kept ones, or those that the function makes."""


class NoisedImages(RolledOut):
    """Clean latents that the stock model draws for the scenes, mixed with fresh noise.

    What the teacher predicts there is asked whenever a state is taken: of one image come many states. The states of an
    image are those of its noise levels, highest first; noise belongs to the number of the state.

    Args:
        *args: See `RolledOut`.
        asks_null: Whether targets need what is predicted where no prompt is given.
        gather: With several processes: sums a tensor over them.
        share: Index of this process and how many there are.
    """

    def __init__(
        self, *args: Any, asks_null: bool = True, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        super().__init__(*args)
        self.asks_null, self.gather, self.share = asks_null, gather, share
        self.levels = self.backbone.timesteps(LEVELS)
        self.clean: Tensor | None = None

    @property
    def per_scene(self) -> int:
        """See `StateSource.per_scene`."""
        return self.rollout.seeds * LEVELS

    def spread(self, count: int) -> Tensor:
        """See `StateSource.spread`; of the first image."""
        return torch.linspace(0, LEVELS - 1, count).long()

    def fill(self, kept: Kept = lambda _number, make: make()) -> None:
        """Draw all images, chunk by chunk; several processes share the chunks.

        Args:
            kept: Gives chunks that are there already.
        """
        clean = torch.zeros(self.trajectories, *self.backbone.latents.shape(), dtype=self.backbone.dtype)
        for number, chunk in chunks(self.trajectories, self.share):
            clean[chunk.start : chunk.stop] = kept(number, partial(self.drawn, chunk)).cpu()
        self.clean = self.gather(clean.to(self.backbone.device))

    @torch.no_grad()
    def drawn(self, trajectories: Sequence[int]) -> Tensor:
        """Clean latents at the ends of trajectories, `(trajectories, channels, h, w)`."""
        backbone = self.backbone
        x = backbone.noise([self.noise_seed(trajectory) for trajectory in trajectories])
        scenes = [trajectory // self.rollout.seeds for trajectory in trajectories]
        for t in backbone.timesteps(self.rollout.steps):
            found = self.predicted(backbone.model_input(x, t), t, scenes)
            x = backbone.step(found.guided(backbone, self.rollout.guidance), t, x)
        return x

    def mixed(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The clean latents of states, the noise that is mixed into them, and the noise levels."""
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
