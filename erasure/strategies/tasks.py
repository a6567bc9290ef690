"""One training of a strategy: what it works on, and the parts of its updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import make_image_grid
from torch import Tensor, nn

from erasure.backbones import Backbone, TextTower
from erasure.concept import Concept
from erasure.interop import paths, scopes
from erasure.text.encodings import Reader
from erasure.training.plugins import InputGrams, RetainProjection, null_space
from erasure.training.states import States, StateSource, stable_seed
from erasure.training.student import Student

INPUT_STATES = 4
"""States of each scene that retained inputs are gathered in."""
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

    def sources(self) -> list[StateSource]:
        """Where states come from."""
        return [source for source in (self.concept_states, self.retain_states) if source is not None]

    @torch.no_grad()
    def null_drift(self, scales: Sequence[float]) -> float:
        """How far the prediction without a prompt moves between scales that the model is told, relative to it.

        A model that was distilled for guidance without error predicts the same at all of them, and what `pushed` says
        of its targets holds as far as it does.
        """
        states = self.concept_states.take(self.concept_states.spread(NULL_STATES))
        told = self.prompts([None] * len(states.x))
        low, high = (self.backbone.predict(states.x, states.t, told, scale) for scale in (min(scales), max(scales)))
        return float((high.float() - low.float()).norm() / low.float().norm())

    def draw(
        self, folder: Path, step: int, steps: int, idle: Sequence[nn.Module], guidance: float | None = None
    ) -> None:
        """Write images of what is erased and of what must survive as `step-000100.png` to a folder.

        Args:
            folder: Where to.
            step: Updates that have been done.
            steps: Denoising steps of each image.
            idle: Components that are off the device and needed for this.
            guidance: Scale of guidance; the pipeline's own when left out.
        """
        kept = self.retain_states.scenes[1:5] if self.retain_states is not None else []
        prompts = [scene.prompt for scene in (*self.concept_states.scenes[:4], *kept) if scene.prompt is not None]
        pipe = self.backbone.pipe
        generators = [torch.Generator().manual_seed(stable_seed(self.seed, prompt)) for prompt in prompts]
        with scopes.placed(idle, self.backbone.device), scopes.quiet(pipe):
            images = pipe(prompts, generator=generators, **self.backbone.call_options(guidance, steps)).images
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
    extra: dict[str, Tensor] | None = None
    """What a strategy adds, by name; what one turn of an update leaves there, the next one finds."""
    update: int = 0
    """Number of the update."""
    others: tuple[Batch, ...] = ()
    """Parts of the same update that further players learn from."""

    def part(self, rows: slice) -> Batch:
        """Inputs of some of the rows."""
        return self._replace(
            x=self.x[rows], t=self.t[rows], guidance=self.guidance[rows], prompts=self.prompts[rows]
        )  # fmt: skip


@torch.no_grad()
def gather_inputs(
    task: Task, source: StateSource, layers: Sequence[str], predict: Callable[[Batch], Tensor]
) -> InputGrams:
    """Inputs of the student's layers, as the stock model, in a few states of every scene."""
    found, spread = InputGrams(), source.spread(INPUT_STATES)
    with found.gathering(task.student.network, layers):
        for scene in range(len(source.scenes)):
            states = source.take(scene * source.per_scene + spread)
            prompts = [each.learned for each in source.of(states)]
            predict(Batch(states.x, states.t, states.guidance, prompts, states, None))
    found.keep(task.student.columns)
    return found


def retain_projection(task: Task, share: float, predict: Callable[[Batch], Tensor]) -> RetainProjection:
    """The projection onto what the inputs of retained prompts leave free, which knows how much of the concept that is.

    Args:
        task: A training whose sources are filled.
        share: Of the energy of the inputs; see `null_space`.
        predict: Runs the network for a batch.
    """
    student = task.student
    layers = [path.removesuffix(".weight") for path in student.paths]
    layers = [path for path in layers if isinstance(paths.layer(student.network, path), nn.Linear)]
    assert task.retain_states is not None
    started = time.perf_counter()
    retained = gather_inputs(task, task.retain_states, layers, predict)
    target = gather_inputs(task, task.concept_states, layers, predict)
    made = RetainProjection(student, {path: null_space(gram, share) for path, gram in retained.grams.items()})
    made.erasability(target.grams)
    made.found["projection_seconds"] = time.perf_counter() - started
    return made
