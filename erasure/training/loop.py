"""The training loop: players (networks) take optimiser steps in turns, on one or many processes of accelerate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple

import torch
from torch import Tensor

from erasure.errors import DivergenceError, OptionError
from erasure.extras import require
from erasure.options import Count, CountOrZero, Decay, NotNegative, Options, Positive
from erasure.training.checkpoint import Checkpoint, Stateful
from erasure.training.combining import Gradient, flat
from erasure.training.cost import DenoiserCost
from erasure.training.run import CHECKPOINT, Run
from erasure.training.states import stable_seed
from erasure.training.turns import Descent, Prepared, Turn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

EXPLODED = 1000.0
"""Factor of the median of its first values above which a loss counts as diverged."""
SETTLING = 10
"""Number of updates in this median."""


class Share(NamedTuple):
    """The part of an update's batch that one process computes at once."""

    number: int
    """Index of the part, counted from 0."""
    parts: int

    def of(self, rows: Tensor) -> Tensor:
        """Select this part of the rows `(batch, ...)`, `(batch / parts, ...)`."""
        return rows[self.number :: self.parts]


Prepare = Callable[[int, Share], Prepared]
"""Prepares the inputs of an update's losses for a part of its batch, with all networks unchanged. Several turns of
an update may get the same object."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(Options):
    """Options of a student's training."""

    steps: Count
    """Number of updates."""
    lr: Positive
    """Peak learning rate of AdamW."""
    accumulation: Count = 1
    """Number of parts in which each process computes its share of a batch (gradient accumulation); more parts need
    less memory."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    warmup: CountOrZero = 0
    """Number of updates in which the learning rate rises linearly to its peak."""
    clip: NotNegative = 1.0
    """Largest norm of the gradient, to which longer ones are clipped; 0 switches clipping off."""
    ema: Decay = 0.0
    """Decay of the exponential moving average of the weights, which becomes the result; 0 takes the last weights."""
    gradient_checkpointing: bool = False
    """Run the denoiser's blocks a second time in the backward pass instead of storing their activations, which
    needs less memory."""

    @property
    def descent(self) -> Descent:
        """Settings of the AdamW that trains the student."""
        return Descent(
            lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup, clip=self.clip, ema=self.ema
        )  # fmt: skip

    def check_batches(self, batches: Mapping[str, int], processes: int) -> None:
        """Refuse batches that cannot be divided equally among processes and parts.

        Raises:
            OptionError: A batch cannot be divided equally.
        """
        parts = self.accumulation * processes
        for name, batch in batches.items():
            if batch % parts:
                raise OptionError(
                    f"option {name!r} is {batch} and does not divide among {processes} processes x "
                    f"{self.accumulation} accumulation steps: take a multiple of {parts}"
                )


def make_accelerator(run: Run, device: torch.device) -> Accelerator:
    """Make an `Accelerator` for the model's device, with the chosen tracker.

    Mixed precision is set by `accelerate launch`; the trained tensors are float32 in any case.

    Raises:
        MissingExtraError: The tracker is not installed.
    """
    from accelerate import Accelerator

    if run.tracker is not None:
        require(run.tracker)
    folder = None if run.folder is None else str(run.folder)
    return Accelerator(cpu=device.type == "cpu", device_placement=False, log_with=run.tracker, project_dir=folder)


class Learner(Generic[Prepared]):
    """A turn with its optimiser, and its other state in checkpoints."""

    def __init__(self, turn: Turn[Prepared], steps: int) -> None:
        self.turn, self.steps, descent = turn, steps, turn.descent
        self.parameters = list(turn.player.parameters())
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=descent.lr, betas=descent.betas, eps=descent.eps, weight_decay=descent.weight_decay
        )
        self.first: list[float] = []
        self.average: EMAModel | None = None
        if descent.ema:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(self.parameters, decay=descent.ema)

    def parts(self) -> dict[str, Stateful]:
        """Give the parts of a checkpoint."""
        name = self.turn.name
        kept: dict[str, Stateful] = {
            name: self.turn.player, f"{name}_optimiser": self.optimiser, f"{name}_losses": _Listed(self.first)
        }  # fmt: skip
        return kept if self.average is None else {**kept, f"{name}_average": self.average}

    def rate(self, update: int) -> float:
        """Give the learning rate of an update."""
        descent, done = self.turn.descent, update - self.turn.since
        if done >= descent.warmup and descent.cycles:
            share = (done - descent.warmup) / max(self.steps - self.turn.since - descent.warmup, 1)
            return descent.lr * 0.5 * (1 + math.cos(math.pi * (descent.cycles * share % 1)))
        return descent.lr * min(1.0, (done + 1) / max(descent.warmup, 1))


@dataclass(kw_only=True)
class Trainer(Generic[Prepared]):
    """Trains players in turns.

    Every random choice depends only on the seed and the number of the update. A training that was interrupted and
    resumed therefore ends with the same bits, and several processes compute what one would.
    """

    turns: Sequence[Turn[Prepared]]
    """Optimiser steps of each update, in their order."""
    prepare: Prepare[Prepared]
    steps: int
    """Number of updates."""
    seed: int
    accumulation: int = 1
    """Number of parts in which each process computes its share of a batch (gradient accumulation); more parts need
    less memory."""
    run: Run = field(default_factory=Run)
    accelerator: Accelerator | None = None
    """Processes that train together; only this one when left out."""
    cost: DenoiserCost = field(default_factory=DenoiserCost)
    scales_losses: bool = False
    """Whether losses are scaled to keep gradients from underflow, as float16 models need."""
    before: Callable[[int], None] = lambda update: None
    """Called before every update."""
    validate: Callable[[int], None] = lambda update: None
    """Called every `Run.validate_every` updates on the main process."""
    parts: dict[str, Stateful] = field(default_factory=dict)
    """Additional parts of a checkpoint."""

    def __post_init__(self) -> None:
        """Make the optimisers and the other state of the turns."""
        self.learners = [Learner(turn, self.steps) for turn in self.turns]
        self.scaler = None if self.accelerator is None else self.accelerator.scaler
        if self.scaler is None and self.scales_losses:
            self.scaler = torch.amp.GradScaler(self.learners[0].parameters[0].device.type)

    def train(self, progress: Callable[[float], None]) -> dict[str, float]:
        """Train to the end, starting from the last checkpoint if there is one.

        Returns:
            The last value of every term.

        Raises:
            DivergenceError: A loss is NaN or has grown too large; the last checkpoint is kept.
            TrainingError: A checkpoint cannot be read or written.
        """
        state = self._checkpoint()
        start = state.resume(self.steps) if state else 0
        for after in (after for turn in self.turns for after in turn.after if start == 0):
            after.start()
        tracker = self.accelerator if self.run.tracker is not None else None
        if tracker is not None:
            tracker.init_trackers("erasure")
        row: dict[str, float] = {}
        for update in range(start, self.steps):
            torch.manual_seed(stable_seed(self.seed, "update", update))
            self.before(update)
            row |= self.update(update)
            if tracker is not None:
                tracker.log({**row, "denoiser_forwards": self.cost.forwards}, step=update)
            done = update + 1
            if state and self.is_main and (done % self.run.save_every == 0 or done == self.steps):
                state.save(done)
            if self.run.validate_every and done % self.run.validate_every == 0:
                self._validate(done)
            progress(done / self.steps)
        for learner in self.learners:
            if learner.average is not None:
                learner.average.copy_to(learner.parameters)
        if tracker is not None:
            tracker.end_training()
        return row

    def update(self, update: int) -> dict[str, float]:
        """Let every player whose turn is due take a step, and give the loss terms."""
        row: dict[str, float] = {}
        known: Prepared | None = None
        due = [learner for learner in self.learners if learner.turn.is_due(update)]
        for learner in due:
            gradients: list[Gradient] = []
            terms: dict[str, float] = {}
            for share in self.shares():
                if known is None or self.accumulation > 1:  # of several parts, only one is in memory at a time
                    known = self.prepare(update, share)
                found, parts = self._gradients(learner, known)
                gradients = [summed(*pair) for pair in zip(gradients, parts, strict=True)] if gradients else parts
                terms = {name: terms.get(name, 0.0) + value for name, value in found.items()}
            self._check(learner, terms, update)
            self._step(learner, gradients, update)
            row |= terms
        if due and self.scaler is not None:
            self.scaler.update()
        return row

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator is None or self.accelerator.is_main_process

    def shares(self) -> list[Share]:
        """List the parts of a batch that this process computes."""
        index, count = 0, 1
        if self.accelerator is not None:
            index, count = self.accelerator.process_index, self.accelerator.num_processes
        return [Share(index * self.accumulation + i, self.accumulation * count) for i in range(self.accumulation)]

    # Single steps ---------------------------------------------------------------------------------------------------

    def _gradients(self, learner: Learner[Prepared], prepared: Prepared) -> tuple[dict[str, float], list[Gradient]]:
        """Compute the loss terms of a part of a batch, and its share of the batch's gradients."""
        turn = learner.turn
        with nullcontext() if self.accelerator is None else self.accelerator.autocast():
            terms = turn.player(partial(turn.losses, prepared))
        losses = [loss / self.accumulation for loss in turn.combine.losses(terms)]
        gradients = []
        for number, loss in enumerate(losses):
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            gradients.append(
                torch.autograd.grad(
                    scaled, learner.parameters, retain_graph=number + 1 < len(losses), materialize_grads=True
                )
            )
        return {name: term.item() / self.accumulation for name, term in terms.items()}, [list(g) for g in gradients]

    def _step(self, learner: Learner[Prepared], gradients: list[Gradient], update: int) -> None:
        turn, rate = learner.turn, learner.rate(update)
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            gradients = [mean_over(self.accelerator, gradient) for gradient in gradients]
        # Gradients are unscaled first, because surgery depends on their norms.
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        if scale != 1:
            gradients = [[part / scale for part in gradient] for gradient in gradients]
        for parameter, part in zip(learner.parameters, turn.combine.combined(gradients), strict=True):
            parameter.grad = part if scale == 1 else part * scale
        for group in learner.optimiser.param_groups:
            group["lr"] = rate
        if self.scaler is not None:
            self.scaler.unscale_(learner.optimiser)
        if turn.descent.clip:
            torch.nn.utils.clip_grad_norm_(learner.parameters, turn.descent.clip)
        if self.scaler is not None:
            self.scaler.step(learner.optimiser)
        else:
            learner.optimiser.step()
        learner.optimiser.zero_grad()
        for after in turn.after:
            after.apply(update, rate)
        if learner.average is not None:
            learner.average.step(learner.parameters)

    def _check(self, learner: Learner[Prepared], row: dict[str, float], update: int) -> None:
        """Stop at a NaN, or when the terms of a turn together grow too large; single terms may start at zero."""
        total, first = sum(row.values()), learner.first
        settled = len(first) >= SETTLING
        if not settled:
            first.append(total)
        usual = statistics.median(first)
        exploded = settled and not learner.turn.signed and total > EXPLODED * usual
        if math.isfinite(total) and not exploded:
            return
        name, value = max(row.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
        times = f", and all terms {total / usual:.0f} times their start" if exploded and usual else ""
        kept = f"; the last checkpoint in {self.run.checkpoints} is kept" if self.run.checkpoints else ""
        rate = learner.turn.rate
        raise DivergenceError(
            f"the loss {name!r} is {value:.4g} at step {update} of {self.steps}{times}: lower {rate} (now "
            f"{learner.turn.descent.lr:g}){kept}"
        )

    # Around them ----------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> Checkpoint | None:
        folder = self.run.folder
        if folder is None:
            return None
        parts: dict[str, Stateful] = {"cost": self.cost, **self.parts}
        if self.scaler is not None:
            parts["scaler"] = self.scaler
        for learner in self.learners:
            parts |= learner.parts()
        return Checkpoint(folder / CHECKPOINT, **parts)

    def _validate(self, update: int) -> None:
        if self.is_main:
            self.validate(update)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


class _Listed:
    """A list of numbers as a part of a checkpoint."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, list[float]]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.values[:] = state["values"]


def summed(first: Gradient, second: Gradient) -> Gradient:
    """Add two gradients."""
    return [a + b for a, b in zip(first, second, strict=True)]


def mean_over(accelerator: Accelerator, gradient: Gradient) -> Gradient:
    """Average a gradient over all processes."""
    mean = accelerator.reduce(flat(gradient), reduction="mean").split([part.numel() for part in gradient])
    return [part.view_as(like) for part, like in zip(mean, gradient, strict=True)]
