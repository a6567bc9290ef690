"""One training of a strategy: its model, prompts and states, and the batches of its updates."""

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
"""Number of states of each prompt on which layers' inputs are gathered."""
NULL_STATES = 4
"""Number of states on which predictions without a prompt are compared."""


@dataclass
class Task:
    """One training of a strategy: the model, its prompts, its states, and the student."""

    backbone: Backbone
    tower: TextTower
    concepts: Sequence[Concept]
    seed: int
    prompts: Reader
    student: Student
    concept_states: StateSource
    retain_states: StateSource | None

    def sources(self) -> list[StateSource]:
        """List the sources of training states."""
        return [source for source in (self.concept_states, self.retain_states) if source is not None]

    @torch.no_grad()
    def null_drift(self, scales: Sequence[float]) -> float:
        """Measure how far the prediction without a prompt differs between two guidance scales, relative to its norm.

        A model that was guidance-distilled without error predicts the same at all scales. The smaller the result, the
        better the formula of `NegativeGuidance.pushed` holds.
        """
        states = self.concept_states.take(self.concept_states.spread(NULL_STATES))
        conditioning = self.prompts([None] * len(states.x))
        low, high = (
            self.backbone.predict(states.x, states.t, conditioning, scale) for scale in (min(scales), max(scales))
        )
        return float((high.float() - low.float()).norm() / low.float().norm())

    def draw(
        self, folder: Path, step: int, steps: int, idle: Sequence[nn.Module], guidance: float | None = None
    ) -> None:
        """Draw images of erased and of retained prompts into a folder, as `step-000100.png`.

        Args:
            folder: Folder to write to.
            step: Number of updates done.
            steps: Number of denoising steps of each image.
            idle: Components that are off the device and are needed to draw.
            guidance: Guidance scale; the pipeline's own when left out.
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
    """One process's part of an update's rows."""

    x: Tensor
    """Noised latents, `(rows, channels, h, w)`."""
    t: Tensor
    """Timesteps, `(rows,)`."""
    guidance: Tensor
    """Guidance scales that a guidance-distilled denoiser reads, `(rows,)`."""
    prompts: list[str | None]
    """Prompt of every row; `None` for the null conditioning."""
    concept: States
    """States of the first rows, which are the concept's."""
    retained: States | None
    """States of the following rows, which must survive; `None` where there are none."""
    extra: dict[str, Tensor] | None = None
    """Tensors that a strategy adds, by name; one optimiser step of an update can leave results here for the next
    one."""
    update: int = 0
    """Number of the update."""
    others: tuple[Batch, ...] = ()
    """Rows of the same update for the other players."""

    def part(self, rows: slice) -> Batch:
        """Select the inputs of a slice of rows."""
        return self._replace(
            x=self.x[rows], t=self.t[rows], guidance=self.guidance[rows], prompts=self.prompts[rows]
        )  # fmt: skip


@torch.no_grad()
def gather_inputs(
    task: Task, source: StateSource, layers: Sequence[str], predict: Callable[[Batch], Tensor]
) -> InputGrams:
    """Gather Gram matrices of the inputs of the student's layers, on a few states of every prompt."""
    found, spread = InputGrams(), source.spread(INPUT_STATES)
    with found.gathering(task.student.network, layers):
        for scene in range(len(source.scenes)):
            states = source.take(scene * source.per_scene + spread)
            prompts = [each.learned for each in source.of(states)]
            predict(Batch(states.x, states.t, states.guidance, prompts, states, None))
    found.keep(task.student.columns)
    return found


def retain_projection(task: Task, share: float, predict: Callable[[Batch], Tensor]) -> RetainProjection:
    """Make the projection onto directions that retained inputs do not use, with the concept's share of energy in them.

    Args:
        task: A training whose sources are filled.
        share: Share of the energy of the inputs that is protected; see `null_space`.
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
