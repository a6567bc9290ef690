"""What strategies have in common that train players in the loop: options, and the run around the loop."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
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
from erasure.strategies.base import Fit, Standing, Strategy, Way
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
    """A strategy that trains players against the stock model."""

    trains: ClassVar[bool] = True

    batch: Count = 4
    """States of the concept in each update, over all processes."""
    retain_batch: CountOrZero = 4
    """States of prompts that must survive in each update; 0 for none."""
    rank: CountOrZero = 16
    """Of the LoRA; 0 trains whole parameters."""
    resolution: Count | None = None
    """Side in pixels of the square images that trajectories lead to; the model's own size when left out."""
    text_length: Annotated[int, Ge(1), Le(512)] | None = None
    """Tokens that T5 pads prompts to; the model's own length when left out. An erasure holds for the length that it
    was made with: what T5 says of the same words depends on it."""
    templates: bool = True
    """Train on every phrasing of the concept. Without, on its names alone (released code)."""
    contexts: CountOrZero = 12
    """Random prompts that name each concept among other words, besides its phrasings."""
    retain_vocabulary: CountOrZero = 32
    """Random prompts from the tokeniser's own words that must survive, besides the retain lists."""
    retain_weight: NotNegative = 4.0
    """Weight of their loss."""

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return next((name for name in ("retain_batch", "retain_weight") if not getattr(self, name)), "")

    def adds(self, earlier: Sequence[str]) -> Way:
        """See `Strategy.adds`: always on top, so that a request costs the training of what it asks for."""
        return "on top"

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Train without keeping anything on disk; see `train`."""
        return self.train(backbone, concepts, seed=seed, progress=progress, run=Run())

    def train(
        self,
        backbone: Backbone,
        concepts: Sequence[Concept],
        *,
        seed: int,
        progress: Callable[[float], None],
        run: Run,
        standing: Standing | None = None,
    ) -> Fit:
        """Train, with checkpoints and logs as a run says.

        The teacher is the model as it is given. Where an erasure is in force on it, prompts with what that erases are
        among those that must survive: they go on to give what the teacher gives for them.

        Raises:
            DivergenceError: A loss became NaN or exploded.
            NoMatchingModuleError: The model has no parameter that the options choose.
            OptionError: A batch does not divide among the processes.
            TrainingError: The run's folder is in use, holds something else, or cannot be written.
        """
        tower = backbone.reader
        for name in (name for concept in concepts for name in concept.names):
            tower.check_words(name)
        accelerator, cost = make_accelerator(run, backbone.device), DenoiserCost()
        self.check_batches({"batch": self.batch, "retain_batch": self.retain_batch}, accelerator.num_processes)
        model = model_fingerprint(backbone.pipe)
        if standing is not None:
            # An erasure may live in hooks, which no weight tells of.
            model += f"+{standing.fingerprint}"
        recipe = {
            "strategy": self.name, "options": dataclasses.asdict(self), "seed": seed, "model": model,
            "session": session_of(backbone), "concepts": [concept.to_dict() for concept in concepts],
        }  # fmt: skip
        with run.opened(recipe, accelerator.is_main_process), ExitStack() as stack:
            stack.enter_context(scopes.frozen(backbone.denoiser, *(t.module for t in backbone.towers)))
            stack.enter_context(rolling_out(backbone))
            stack.enter_context(cost.counting(backbone.denoiser))
            task = self.task(backbone, tower, concepts, seed, accelerator, standing)
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
        """See `Strategy.session`: with `resolution` and `text_length`.

        Raises:
            OptionError: The size cannot be drawn, or no text encoder has a free length.
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
        """Prompts that must survive, to roll out."""
        return retain_scenes(tower, concepts, seed, self.retain_vocabulary)

    @abstractmethod
    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        standing: Standing | None = None,
    ) -> Task:  # fmt: skip
        """Make what a training works on.

        Args:
            backbone: The model.
            tower: The text encoder whose words prompts are made of.
            concepts: What to erase.
            seed: Of everything random.
            accelerator: The processes.
            standing: What is in force on the model already.
        """

    @abstractmethod
    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """Fill the sources of states.

        Args:
            task: The training.
            model: Fingerprint of the stock model.
            accelerator: The processes, which share the work.
        """

    @abstractmethod
    def turns(self, task: Task, after: tuple[After, ...]) -> Sequence[Turn[Any]]:
        """Who learns what in an update.

        Args:
            task: The training.
            after: What is done behind the student's steps.
        """

    def students(self, task: Task) -> Sequence[Student]:
        """All that the network is made while it trains."""
        return [task.student]

    def after(self, task: Task) -> tuple[After, ...]:
        """What is done behind the student's steps."""
        return ()

    @abstractmethod
    def prepare(self, task: Task, step: int, share: Share) -> Any:
        """What the losses of an update need of a part of its batch."""

    def before(self, task: Task, step: int) -> None:
        """Called ahead of every update."""

    def parts(self, task: Task) -> dict[str, Stateful]:
        """What a checkpoint holds besides players and optimisers."""
        return {}

    def figures(self, task: Task) -> dict[str, float]:
        """What is worth keeping of a training ahead of its first update."""
        return {}

    def surroundings(self, task: Task) -> AbstractContextManager[object]:
        """What holds from ahead of the first rollout to behind the last update, and is undone then."""
        return nullcontext()

    @abstractmethod
    def edits(self, task: Task) -> Edits:
        """What was learned."""

    @abstractmethod
    def idle(self, backbone: Backbone) -> list[torch.nn.Module]:
        """Components that training does not run, which leave the device meanwhile."""

    @abstractmethod
    def validate(self, task: Task, run: Run, cost: DenoiserCost, update: int) -> None:
        """Images of what is erased and of what must survive, `validation/step-000100.png` in the run's folder."""
