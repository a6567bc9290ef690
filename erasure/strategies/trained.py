"""The base class of strategies that train on trajectories: options, prompts, states, and one student."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.concept import Concept
from erasure.options import Count, NotNegative, Positive, ZeroToOne
from erasure.strategies.base import EarlierErasure
from erasure.strategies.looped import LoopedStrategy
from erasure.strategies.prompts import earlier_scenes
from erasure.strategies.tasks import Batch, Task, retain_projection
from erasure.text.encodings import Reader
from erasure.training import storage
from erasure.training.checkpoint import Stateful
from erasure.training.cost import DenoiserCost
from erasure.training.images import NoisedImages
from erasure.training.loop import Share
from erasure.training.objectives import matching
from erasure.training.plugins import GroupLasso
from erasure.training.run import Run
from erasure.training.states import Mode, Scene, States, StateSource, draw
from erasure.training.student import LowRankStudent, Student
from erasure.training.trajectories import OnlineStates, Rollout, TrajectoryBuffer
from erasure.training.turns import After, Turn

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class TrainedStrategy(LoopedStrategy):
    """A strategy that trains a student against the stock model on steps of denoising trajectories."""

    moves_null: ClassVar[bool] = True
    """Whether training changes the predictions for the empty prompt, so that these must be retained."""
    asks_null: ClassVar[bool] = True
    """Whether targets need the stock model's predictions for the empty prompt."""

    steps: Count = 200
    """Number of updates."""
    lr: Positive = 5e-4
    """Learning rate of AdamW, constant after the warm-up."""
    states: Mode = "buffer"
    """Where training states come from. `buffer`: trajectories are sampled once and stored. `online`: a new
    trajectory is sampled for every state, as released code does. `images`: images are drawn once, and noised anew
    for every state."""
    rollouts: Count = 1
    """Number of trajectories, or images, of each prompt with the concept."""
    retain_rollouts: Count = 1
    """Number of trajectories, or images, of each prompt that must survive."""
    rollout_steps: Count = 20
    """Number of denoising steps of a trajectory (ESD: 50)."""
    rollout_guidance: NotNegative = 3.0
    """Guidance scale of trajectories (ESD: 3): classifier-free guidance, or the guidance input of a
    guidance-distilled model. 1 switches guidance off, which suits models of a few steps."""
    trained_guidance: tuple[Positive, ...] = ()
    """Guidance scales at which a guidance-distilled model is trained, one drawn for each state; 1 and
    `rollout_guidance` when left out. `eta` is divided by the scale, so that the target is as far from the base as
    without distillation."""
    rollout_by: Literal["teacher", "student"] = "teacher"
    """Which model samples trajectories: `teacher` the stock model (ESD's diffusers code, AdvUnlearn), `student` the
    model in training, so that it learns on states that it reaches itself (ESD's paper). Targets come from the stock
    model in both cases."""
    refresh: Count = 50
    """Number of updates after which a buffer of the student's trajectories is sampled again."""
    scope_weight: NotNegative = 0.0
    """Weight of a loss that keeps the predictions for prompts without the concept's words, at the concept's own
    states, so that harmless words beside the concept are not unlearned (Scope-aware Unlearning, arXiv 2506.00359)."""
    projection: ZeroToOne = 0.0
    """Share, 0 to 1, of the energy of retained prompts' layer inputs whose directions no update may change; 1
    protects all directions that they span, 0 switches this off. See `erasure.training.plugins.RetainProjection`."""
    group_lasso: NotNegative = 0.0
    """Weight of a penalty that drops whole attention layers from the LoRA; 0 switches it off."""
    group_lasso_from: ZeroToOne = 0.2
    """Share of the updates, 0 to 1, before the penalty of `group_lasso` starts."""

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.states == "images" and self.rollout_by == "student":
            self.refuse("rollout_by", "student", "'teacher' for images, which the stock model draws once")
        if self.projection and not self.retain_batch:
            self.refuse("projection", self.projection, "0 without prompts to retain: raise 'retain_batch'")
        if self.group_lasso and not self.rank:
            self.refuse("group_lasso", self.group_lasso, "0 without a LoRA, which is what it prunes: raise 'rank'")

    @abstractmethod
    def student(self, backbone: Backbone, tower: TextTower, generator: torch.Generator) -> Student:
        """Make the student, which equals the stock model at first."""

    def turns(self, task: Task, after: tuple[After, ...]) -> list[Turn[Batch]]:
        """Give the optimiser steps of an update: one of the student.

        Args:
            task: The training.
            after: Actions after each of the student's optimiser steps.
        """
        return [
            Turn(
                name="student", player=task.student, losses=partial(self.losses, task), descent=self.descent,
                after=after,
            )
        ]  # fmt: skip

    def after(self, task: Task) -> tuple[After, ...]:
        """Give the actions after each of the student's optimiser steps: the group lasso and the projection."""
        student, done = task.student, list[After]()
        if self.group_lasso and isinstance(student, LowRankStudent):
            done.append(GroupLasso(student, self.group_lasso, int(self.group_lasso_from * self.steps)))
        if self.projection:
            done.append(retain_projection(task, self.projection, partial(self.predict, task)))
        return tuple(done)

    @abstractmethod
    def predict(self, task: Task, batch: Batch) -> Tensor:
        """Predict for all rows of a batch, see `Batch`; called while the network is switched to the student."""

    @abstractmethod
    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give prompts with the concepts to sample, and the prompts for which the teacher predicts in addition."""

    @abstractmethod
    def target(self, states: States) -> Tensor:
        """Compute the target for the concept's prompts, shaped as `states.x`."""

    def retained_target(self, states: States) -> Tensor:
        """Give the target for prompts that must survive: the stock model's prediction."""
        return states.own

    def figures(self, task: Task) -> dict[str, float]:
        """Measure how well a guidance-distilled model was distilled, see `Task.null_drift`."""
        scales = self.scales(task.backbone)
        return {"null_drift": task.null_drift(scales)} if len(scales) > 1 else {}

    def scales(self, backbone: Backbone) -> tuple[float, ...]:
        """Give the guidance scales at which a guidance-distilled model is trained; none for other models.

        Raises:
            OptionError: The scales do not fit the model or the options.
        """
        if not backbone.takes_guidance:
            if any(scale != 1 for scale in self.trained_guidance):
                self.refuse("trained_guidance", self.trained_guidance, "() for a model that is not told its guidance")
            return ()
        if not self.rollout_guidance and not self.trained_guidance:
            self.refuse("rollout_guidance", 0.0, "above 0 for a model that is told its guidance")
        return self.trained_guidance or tuple(dict.fromkeys((1.0, self.rollout_guidance)))

    # Steps ----------------------------------------------------------------------------------------------------------

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        earlier: EarlierErasure | None = None,
    ) -> Task:  # fmt: skip
        """Make the prompts, the sources of states (still empty), and the student."""
        scenes = self.scenes(tower, concepts, seed)
        kept = self.retained_scenes(tower, concepts, seed) if self.retain_batch else []
        if earlier is not None and kept:
            kept = list(dict.fromkeys([*kept, *earlier_scenes(tower, earlier.concepts, seed, self.contexts)]))
        every = [prompt for scene in (*scenes, *kept) for prompt in (scene.prompt, scene.learned, *scene.asks)]
        prompts = Reader(backbone).read(["", *every])
        if kept and self.moves_null and not torch.equal(prompts.null(1).tokens, prompts([""]).tokens):
            kept.append(Scene(None))
        student = self.student(backbone, tower, torch.Generator().manual_seed(seed))

        def source(scenes: list[Scene], count: int) -> StateSource:
            rollout = Rollout(
                seeds=count, steps=self.rollout_steps, guidance=self.rollout_guidance,
                trained_guidance=self.scales(backbone),
            )  # fmt: skip
            leader = student if self.rollout_by == "student" else None
            if self.states == "online":
                return OnlineStates(backbone, scenes, prompts, rollout, seed, student=leader)
            shared = {
                "gather": accelerator.reduce, "share": (accelerator.process_index, accelerator.num_processes)
            }  # fmt: skip
            if self.states == "images":
                return NoisedImages(backbone, scenes, prompts, rollout, seed, asks_null=self.asks_null, **shared)
            return TrajectoryBuffer(backbone, scenes, prompts, rollout, seed, student=leader, **shared)

        return Task(
            backbone, tower, concepts, seed, prompts, student, source(scenes, self.rollouts),
            source(kept, self.retain_rollouts) if kept else None,
        )  # fmt: skip

    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """Sample the stock model's trajectories, or load them from disk; a new student's trajectories are the same."""
        for source in task.sources():
            if isinstance(source, TrajectoryBuffer):
                storage.fill(source, model, accelerator)
            elif isinstance(source, NoisedImages):
                storage.draw(source, model)

    def before(self, task: Task, step: int) -> None:
        """Sample the student's trajectories again every `refresh` updates."""
        if step and step % self.refresh == 0:
            for source in task.sources():
                if isinstance(source, TrajectoryBuffer) and source.student is not None:
                    source.fill()

    def parts(self, task: Task) -> dict[str, Stateful]:
        """Give what a checkpoint contains in addition to student and optimiser."""
        return {
            name: source
            for name, source in (("concept_states", task.concept_states), ("retain_states", task.retain_states))
            if isinstance(source, TrajectoryBuffer) and source.student is not None
        }

    def chosen(self, task: Task, source: StateSource, count: int, name: str, step: int) -> Tensor:
        """Choose the indices of `count` states of a source (`concept` or `retain`), over all processes."""
        return draw(len(source), count, task.seed, name, step)

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """Prepare an update's rows: the concept's, retained ones, and the concept's again for `scope_weight`."""

        def take(source: StateSource, count: int, name: str) -> States:
            return source.take(share.of(self.chosen(task, source, count, name, step)))

        concept = take(task.concept_states, self.batch, "concept")
        scenes = task.concept_states.of(concept)
        x, t, guidance = [concept.x], [concept.t], [concept.guidance]
        prompts = [scene.learned for scene in scenes]
        retained = None
        if task.retain_states is not None:
            retained = take(task.retain_states, self.retain_batch, "retain")
            x, t, guidance = [*x, retained.x], [*t, retained.t], [*guidance, retained.guidance]
            prompts += [scene.learned for scene in task.retain_states.of(retained)]
        if self.scope_weight:
            x, t, guidance = [*x, concept.x], [*t, concept.t], [*guidance, concept.guidance]
            prompts += [scene.asks[-1] for scene in scenes]
        return Batch(torch.cat(x), torch.cat(t), torch.cat(guidance), prompts, concept, retained, update=step)

    def losses(self, task: Task, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss terms of an update."""
        concept, retained = batch.concept, batch.retained
        found = self.predict(task, batch)
        count = len(concept.x)
        terms = {"erase": matching(found[:count], self.target(concept))}
        if retained is not None:
            terms["retain"] = self.retain_weight * matching(
                found[count : count + len(retained.x)], self.retained_target(retained)
            )
        if self.scope_weight:
            terms["scope"] = self.scope_weight * matching(found[-count:], concept.asked[:, -1])
        return terms

    def validate(self, task: Task, run: Run, cost: DenoiserCost, update: int) -> None:
        """Draw images of erased and of retained prompts, as `validation/step-000100.png` in the run's folder."""
        if run.folder is not None:
            with task.student.active(), torch.no_grad(), cost.paused():
                task.draw(run.folder / "validation", update, self.rollout_steps, self.idle(task.backbone))
