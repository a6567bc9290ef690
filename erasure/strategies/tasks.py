"""One training of a strategy: what it works on, and the parts of its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import make_image_grid
from torch import Tensor, nn

from erasure.backbones import Backbone, TextTower
from erasure.concept import Concept
from erasure.interop import scopes
from erasure.text.encodings import Reader
from erasure.training.states import States, StateSource, TrajectoryBuffer, stable_seed
from erasure.training.student import Student

NULL_STATES = 4
"""States of a trajectory that predictions without a prompt are compared in."""


@dataclass
class Task:
    """One training of a strategy."""

    backbone: Backbone
    tower: TextTower
    concepts: Sequence[Concept]
    seed: int
    prompts: Reader
    student: Student
    concept_states: StateSource
    retain_states: StateSource | None

    def buffers(self) -> list[TrajectoryBuffer]:
        """The sources that are filled ahead."""
        return [s for s in (self.concept_states, self.retain_states) if isinstance(s, TrajectoryBuffer)]

    @torch.no_grad()
    def null_drift(self, scales: Sequence[float]) -> float:
        """How far the prediction without a prompt moves between scales that the model is told, relative to it.

        A model that was distilled for guidance without error predicts the same at all of them, and what `pushed` says
        of its targets holds as far as it does.
        """
        steps = self.concept_states.rollout.steps
        states = self.concept_states.take(torch.linspace(0, steps - 1, NULL_STATES).long())
        told = self.prompts([None] * len(states.x))
        low, high = (self.backbone.predict(states.x, states.t, told, scale) for scale in (min(scales), max(scales)))
        return float((high.float() - low.float()).norm() / low.float().norm())

    def draw(self, folder: Path, step: int, steps: int, idle: Sequence[nn.Module]) -> None:
        """Write images of what is erased and of what must survive as `step-000100.png` to a folder.

        Args:
            folder: Where to.
            step: Updates that have been done.
            steps: Denoising steps of each image.
            idle: Components that are off the device and needed for this.
        """
        kept = self.retain_states.scenes[1:5] if self.retain_states is not None else []
        prompts = [scene.prompt for scene in (*self.concept_states.scenes[:4], *kept) if scene.prompt is not None]
        pipe = self.backbone.pipe
        generators = [torch.Generator().manual_seed(stable_seed(self.seed, prompt)) for prompt in prompts]
        with scopes.placed(idle, self.backbone.device), scopes.quiet(pipe):
            images = pipe(prompts, generator=generators, **self.backbone.call_options(steps=steps)).images
        folder.mkdir(exist_ok=True)
        make_image_grid(images, rows=1, cols=len(images)).save(folder / f"step-{step:06d}.png")


class Batch(NamedTuple):
    """A part of an update."""

    x: Tensor
    """`(rows, channels, h, w)`."""
    t: Tensor
    """`(rows,)`."""
    guidance: Tensor
    """`(rows,)` scale that the denoiser is told, if it is told any."""
    prompts: list[str | None]
    """Prompt of every row; `None` where it has none."""
    concept: States
    """The states of the first rows."""
    retained: States | None
    """States of the rows that follow; `None` where nothing must survive."""
    extra: Mapping[str, Tensor] | None = None
    """What a strategy adds, by name."""
