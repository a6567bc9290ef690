"""The one training loop: losses in, a trained student out, on one process or under `accelerate launch` on many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone
from erasure.errors import DivergenceError, OptionError
from erasure.extras import require
from erasure.options import Count, CountOrZero, Decay, NotNegative, Options, Positive
from erasure.training.checkpoint import Checkpoint, Stateful
from erasure.training.cost import DenoiserCost
from erasure.training.plugins import GroupLasso, RetainProjection
from erasure.training.run import CHECKPOINT, Run
from erasure.training.states import stable_seed
from erasure.training.student import Student

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

EXPLODED = 1000.0
"""Times the median of its first values that the loss may grow to."""
SETTLING = 10
"""Updates that make up this median."""


class Share(NamedTuple):
    """A part of each update's global batch: what one process computes at once."""

    number: int
    """Which of the parts, from 0 on."""
    parts: int

    def of(self, rows: Tensor) -> Tensor:
        """The rows `(batch, ...)` of this part, `(batch / parts, ...)`."""
        return rows[self.number :: self.parts]


Prepared = TypeVar("Prepared")
"""What a strategy makes of a part of an update's batch, for its losses."""
Prepare = Callable[[int, Share], Prepared]
"""What the losses of an update need of a part of its batch: called while the network is the teacher."""
Losses = Callable[[Prepared], dict[str, Tensor]]
"""Loss terms of what was prepared, each already weighted: called while the network is the student."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(Options):
    """How a student is trained."""

    steps: Count
    """Updates."""
    lr: Positive
    """Peak learning rate of AdamW."""
    accumulation: Count = 1
    """Parts that each process computes its share of a batch in, one after the other."""
    weight_decay: NotNegative = 0.0
    """Of AdamW."""
    warmup: CountOrZero = 0
    """Updates of linear warm-up."""
    clip: NotNegative = 1.0
    """Greatest norm of the gradient; 0 for none."""
    ema: Decay = 0.0
    """Decay of the running mean of the weights that becomes the result; 0 takes the last weights."""
    gradient_checkpointing: bool = False
    """Whether blocks of the denoiser run twice instead of keeping their activations."""

    def check_batches(self, batches: Mapping[str, int], processes: int) -> None:
        """Refuse batches that do not fall into equal parts.

        Raises:
            OptionError: One does not.
        """
        parts = self.accumulation * processes
        for name, batch in batches.items():
            if batch % parts:
                raise OptionError(
                    f"option {name!r} is {batch} and does not divide among {processes} processes x "
                    f"{self.accumulation} accumulation steps: take a multiple of {parts}"
                )


def make_accelerator(run: Run, device: torch.device) -> Accelerator:
    """Accelerate for the device that the model is on, with the tracker that was asked for.

    Mixed precision is what `accelerate launch` was told; the trained tensors are float32 in any case.

    Raises:
        MissingExtraError: The tracker is not installed.
    """
    from accelerate import Accelerator

    if run.tracker is not None:
        require(run.tracker)
    folder = None if run.folder is None else str(run.folder)
    return Accelerator(cpu=device.type == "cpu", device_placement=False, log_with=run.tracker, project_dir=folder)


@dataclass
class Trainer(Generic[Prepared]):
    """Trains a student.

    Every random choice follows from the seed and the number of the update, so a training that was killed and resumed
    ends with the same bits, and several processes compute what one would.
    """

    backbone: Backbone
    student: Student
    prepare: Prepare[Prepared]
    losses: Losses[Prepared]
    options: Optimisation
    run: Run
    accelerator: Accelerator
    seed: int
    cost: DenoiserCost
    before: Callable[[int], None] = lambda step: None
    """Called ahead of every update."""
    validate: Callable[[int], None] = lambda step: None
    """Called every `Run.validate_every` updates, on the main process, while the network is the student."""
    projection: RetainProjection | None = None
    lasso: GroupLasso | None = None
    lasso_from: int = 0
    """First update that prunes."""
    parts: dict[str, Stateful] = field(default_factory=dict)
    """What else a checkpoint must hold."""

    def __post_init__(self) -> None:
        """Make the optimiser and what else the options ask for."""
        self.parameters = list(self.student.parameters())
        options = self.options
        self.optimiser = torch.optim.AdamW(self.parameters, lr=options.lr, weight_decay=options.weight_decay)
        self.scaler = self._scaler()
        self.first: list[float] = []
        self.average: EMAModel | None = None
        if options.ema:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(self.parameters, decay=options.ema)

    def train(self, progress: Callable[[float], None]) -> dict[str, float]:
        """Train to the end, from the last checkpoint on if there is one.

        Returns:
            The last value of every term, and the cost.

        Raises:
            DivergenceError: A term is NaN or exploded; the last checkpoint is kept.
            TrainingError: A checkpoint cannot be read or written.
        """
        state = self._checkpoint()
        start = state.resume(self.options.steps) if state else 0
        if start == 0 and self.projection is not None:
            self.projection.apply()
        # After resuming: wrapped objects load in ways of their own.
        student, optimiser = self.accelerator.prepare(self.student, self.optimiser)
        if self.run.tracker is not None:
            self.accelerator.init_trackers("erasure")
        row: dict[str, float] = {}
        last = self.options.steps
        with ExitStack() as stack:
            if self.options.gradient_checkpointing:
                stack.enter_context(self.student.checkpointed(self.backbone.denoiser))
            for step in range(start, last):
                torch.manual_seed(stable_seed(self.seed, "update", step))
                self.before(step)
                row = self.update(student, optimiser, step)
                if self.run.tracker is not None:
                    self.accelerator.log({**row, "denoiser_forwards": self.cost.forwards}, step=step)
                done = step + 1
                if state and self.accelerator.is_main_process and (done % self.run.save_every == 0 or done == last):
                    state.save(done)
                if self.run.validate_every and done % self.run.validate_every == 0:
                    self._validate(done)
                progress(done / last)
        if self.average is not None:
            self.average.copy_to(self.parameters)
        if self.run.tracker is not None:
            self.accelerator.end_training()
        return row

    def update(self, student: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> dict[str, float]:
        """One optimiser step; returns the terms of its loss."""
        options, accelerator = self.options, self.accelerator
        lr = options.lr * min(1.0, (step + 1) / max(options.warmup, 1))
        for group in optimiser.param_groups:
            group["lr"] = lr
        count = options.accumulation * accelerator.num_processes
        row: dict[str, float] = {}
        for part in range(options.accumulation):
            share = Share(accelerator.process_index * options.accumulation + part, count)
            later = part + 1 < options.accumulation
            prepared = self.prepare(step, share)
            with accelerator.no_sync(student) if later else nullcontext():
                terms: dict[str, Tensor] = student(partial(self.losses, prepared))
                total = torch.stack([term.float() for term in terms.values()]).sum() / options.accumulation
                self._backward(total)
            for name, term in terms.items():
                row[name] = row.get(name, 0.0) + term.item() / options.accumulation
        self._check(row, step)
        self._step(optimiser)
        if self.lasso is not None and step >= self.lasso_from:
            self.lasso.apply(lr)
        if self.projection is not None:
            self.projection.apply()
        if self.average is not None:
            self.average.step(self.parameters)
        return row

    # Single steps ---------------------------------------------------------------------------------------------------

    def _scaler(self) -> torch.amp.GradScaler | None:
        """For a float16 model, whose gradients underflow: accelerate brings its own only with mixed precision."""
        if self.backbone.dtype != torch.float16 or self.accelerator.scaler is not None:
            return None
        return torch.amp.GradScaler(self.backbone.device.type)

    def _backward(self, total: Tensor) -> None:
        self.accelerator.backward(self.scaler.scale(total) if self.scaler is not None else total)

    def _step(self, optimiser: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser)
        if self.options.clip:
            self.accelerator.clip_grad_norm_(self.parameters, self.options.clip)
        if self.scaler is not None:
            self.scaler.step(self.optimiser)
            self.scaler.update()
        else:
            optimiser.step()
        optimiser.zero_grad()

    def _check(self, row: dict[str, float], step: int) -> None:
        """Stop at a term that is NaN, or when all together explode: single ones may start at zero."""
        total = sum(row.values())
        if len(self.first) < SETTLING:
            self.first.append(total)
        usual = statistics.median(self.first)
        exploded = step >= SETTLING and total > EXPLODED * usual
        if math.isfinite(total) and not exploded:
            return
        name, value = max(row.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
        times = f", and all terms {total / usual:.0f} times their start" if exploded and usual else ""
        kept = f"; the last checkpoint in {self.run.checkpoints} is kept" if self.run.checkpoints else ""
        raise DivergenceError(
            f"the loss {name!r} is {value:.4g} at step {step} of {self.options.steps}{times}: lower lr (now "
            f"{self.options.lr:g}){kept}"
        )

    # Around them ----------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> Checkpoint | None:
        folder = self.run.folder
        if folder is None:
            return None
        optional = {"average": self.average, "scaler": self.scaler}
        parts = {name: part for name, part in optional.items() if part is not None}
        return Checkpoint(
            folder / CHECKPOINT,
            student=self.student, optimiser=self.optimiser, cost=self.cost, losses=_Listed(self.first),
            **parts, **self.parts,
        )  # fmt: skip

    def _validate(self, step: int) -> None:
        if self.accelerator.is_main_process:
            with self.student.active(), torch.no_grad(), self.cost.paused():
                self.validate(step)
        self.accelerator.wait_for_everyone()


class _Listed:
    """A list of numbers as a part of a checkpoint."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, list[float]]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.values[:] = state["values"]
