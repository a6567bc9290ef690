"""The base class of strategies that train in the loop of `erasure.training.loop`: options and the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le

from erasure.backbones import Backbone, TextTower
from erasure.cache import model_fingerprint
from erasure.carriers.edits import Edits
from erasure.concept import Concept
from erasure.interop import scopes
from erasure.options import Count, CountOrZero, NotNegative
from erasure.strategies.base import EarlierErasure, Fit, Strategy, Way
from erasure.strategies.prompts import retain_scenes
from erasure.strategies.tasks import Task
from erasure.training.checkpoint import Stateful
from erasure.training.cost import DenoiserCost
from erasure.training.loop import Optimisation, Share, Trainer, make_accelerator
from erasure.training.run import Run
from erasure.training.states import Scene, session_of
from erasure.training.student import Student, checkpointed
from erasure.training.trajectories import rolling_out
from erasure.training.turns import After, Turn

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class LoopedStrategy(Optimisation, Strategy):
    """A strategy that trains networks (players) with the stock model as teacher."""

    trains: ClassVar[bool] = True

    batch: Count = 4
    """Number of training states of concepts in each update, over all processes."""
    retain_batch: CountOrZero = 4
    """Number of training states of prompts that must survive in each update, over all processes; 0 for none."""
    rank: CountOrZero = 16
    """Rank of the LoRA that is trained; 0 trains whole parameters."""
    resolution: Count | None = None
    """Side in pixels of the square images that are sampled in training; the model's own size when left out."""
    text_length: Annotated[int, Ge(1), Le(512)] | None = None
    """Number of tokens to which prompts are padded for T5; the model's own length when left out. An erasure is made
    for one length, because T5's encoding of the same words depends on the padding."""
    templates: bool = True
    """Train on every phrasing of the concept; when off, on its names alone (released code of most methods)."""
    contexts: CountOrZero = 12
    """Number of random prompts that name each concept among other words, in addition to its phrasings."""
    retain_vocabulary: CountOrZero = 32
    """Number of random prompts, made of the tokeniser's words, that must survive in addition to the retain lists."""
    retain_weight: NotNegative = 4.0
    """Weight of the loss on prompts that must survive."""

    def ignores_retain(self) -> str:
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return next((name for name in ("retain_batch", "retain_weight") if not getattr(self, name)), "")

    def adds(self, earlier: Sequence[str]) -> Way:
        """Add concepts on top, see `Strategy.adds`, so that only the new concepts are trained."""
        return "on top"

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Train without saving anything to disk, see `train`."""
        return self.train(backbone, concepts, seed=seed, progress=progress, run=Run())

    def train(
        self,
        backbone: Backbone,
        concepts: Sequence[Concept],
        *,
        seed: int,
        progress: Callable[[float], None],
        run: Run,
        earlier: EarlierErasure | None = None,
    ) -> Fit:
        """Train, with checkpoints and logs as `run` says.

        The teacher is the model as it is given. Where an erasure is in force on it (`earlier`), prompts with the
        concepts of that erasure are retained too: the student learns the teacher's predictions for them.

        Raises:
            DivergenceError: A loss became NaN or exploded.
            NoMatchingModuleError: The options choose no parameter of the model.
            OptionError: A batch cannot be divided equally among the processes.
            TrainingError: The run's folder is in use, holds something else, or cannot be written.
        """
        tower = backbone.reader
        for name in (name for concept in concepts for name in concept.names):
            tower.check_words(name)
        accelerator, cost = make_accelerator(run, backbone.device), DenoiserCost()
        self.check_batches({"batch": self.batch, "retain_batch": self.retain_batch}, accelerator.num_processes)
        model = model_fingerprint(backbone.pipe)
        if earlier is not None:
            # An erasure can consist of hooks, which the fingerprint of the weights does not show.
            model += f"+{earlier.fingerprint}"
        recipe = {
            "strategy": self.name, "options": asdict(self), "seed": seed, "model": model,
            "session": session_of(backbone), "concepts": [concept.to_dict() for concept in concepts],
        }  # fmt: skip
        with run.opened(recipe, accelerator.is_main_process), ExitStack() as stack:
            stack.enter_context(scopes.frozen(backbone.denoiser, *(t.module for t in backbone.towers)))
            stack.enter_context(rolling_out(backbone))
            stack.enter_context(cost.counting(backbone.denoiser))
            task = self.task(backbone, tower, concepts, seed, accelerator, earlier)
            stack.enter_context(self.surroundings(task))
            stack.enter_context(scopes.placed(self.idle(backbone), "cpu"))
            cost.begin("rollout")
            self.fill(task, model, accelerator)
            cost.begin("setup")
            turns, figures = self.turns(task, self.after(task)), self.figures(task)
            trainer = Trainer(
                turns=turns, prepare=partial(self.prepare, task), steps=self.steps, seed=seed,
                accumulation=self.accumulation, run=run, accelerator=accelerator, cost=cost,
                scales_losses=backbone.dtype == torch.float16, before=partial(self.before, task),
                validate=partial(self.validate, task, run, cost), parts=self.parts(task),
            )  # fmt: skip
            if self.gradient_checkpointing:
                stack.enter_context(checkpointed(backbone.denoiser, self.students(task)))
            cost.begin("update")
            row = trainer.train(progress)
            cost.begin("setup")
            edits = self.edits(task)
        figures |= {f"loss_{name}": value for name, value in row.items()}
        figures |= {
            "rollout_forwards": float(cost.rollout_forwards),
            "rollout_seconds": cost.seconds["rollout"],
            "update_seconds": cost.seconds["update"],
            "denoiser_forwards": float(cost.forwards),
            "forwards_per_state": cost.forwards / (self.steps * (self.batch + self.retain_batch)),
        }
        if cost.sessions > 1:
            figures |= {"sessions": float(cost.sessions), "earlier_seconds": cost.earlier_seconds}
        for after in (after for turn in turns for after in turn.after):
            figures |= after.figures()
        return Fit(edits, figures)

    def session(self, backbone: Backbone) -> Backbone:
        """Return the model with `resolution` and `text_length`, see `Strategy.session`.

        Raises:
            OptionError: The model cannot sample the size, or no text encoder of it has a variable length.
        """
        size = backbone.size if self.resolution is None else (self.resolution, self.resolution)
        length = backbone.length if self.text_length is None else self.text_length
        made = type(backbone)(backbone.pipe, size=size, length=length)
        made.latents.shape()
        lengths = [tower.max_length for tower in made.towers]
        if self.text_length is not None and self.text_length not in lengths:
            self.refuse("text_length", self.text_length, f"None: the text encoders read {lengths} tokens, always")
        return made

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give the prompts that must survive, to be sampled."""
        return retain_scenes(tower, concepts, seed, self.retain_vocabulary)

    def phrased(self, concepts: Sequence[Concept]) -> list[Concept]:
        """Give the concepts with the phrasings to train on: their own, or the bare name, see `templates`."""
        return [concept if self.templates else replace(concept, templates=("{}",)) for concept in concepts]

    @abstractmethod
    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        earlier: EarlierErasure | None = None,
    ) -> Task:  # fmt: skip
        """Make the objects of one training: prompts, sources of states, and the networks that learn.

        Args:
            backbone: The model.
            tower: Text encoder whose words prompts are made of.
            concepts: Concepts to erase.
            seed: Seed of all random choices.
            accelerator: Processes of the training.
            earlier: Erasure that is in force on the model already.
        """

    @abstractmethod
    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """Sample the training states, before the first update.

        Args:
            task: The training.
            model: Fingerprint of the stock model.
            accelerator: Processes, which share the work.
        """

    @abstractmethod
    def turns(self, task: Task, after: tuple[After, ...]) -> Sequence[Turn[Any]]:
        """Give the optimiser steps of an update, in their order.

        Args:
            task: The training.
            after: Actions after each of the student's optimiser steps.
        """

    def students(self, task: Task) -> Sequence[Student]:
        """List every student that the network can be switched to during training."""
        return [task.student]

    def after(self, task: Task) -> tuple[After, ...]:
        """Give the actions after each of the student's optimiser steps."""
        return ()

    @abstractmethod
    def prepare(self, task: Task, step: int, share: Share) -> Any:
        """Prepare the inputs of an update's losses, for this process's part of the batch."""

    def before(self, task: Task, step: int) -> None:
        """Do what must happen before an update; called before each one."""

    def parts(self, task: Task) -> dict[str, Stateful]:
        """Give what a checkpoint contains in addition to players and optimisers."""
        return {}

    def figures(self, task: Task) -> dict[str, float]:
        """Measure figures to save with the erasure, before the first update."""
        return {}

    def surroundings(self, task: Task) -> AbstractContextManager[object]:
        """Give a context that is entered before the first rollout and left after the last update."""
        return nullcontext()

    @abstractmethod
    def edits(self, task: Task) -> Edits:
        """Return the learned edits."""

    @abstractmethod
    def idle(self, backbone: Backbone) -> list[torch.nn.Module]:
        """List components that training does not run; they are moved off the device during training."""

    @abstractmethod
    def validate(self, task: Task, run: Run, cost: DenoiserCost, update: int) -> None:
        """Draw images of erased and of retained prompts, as `validation/step-000100.png` in the run's folder."""
