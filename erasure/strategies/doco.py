"""DoCo: Unlearning Concepts via Concept Domain Correction and Concept Preserving Gradient (Wu et al., AAAI 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.concept import Concept
from erasure.options import Count, Decay, NotNegative, Positive, Presets
from erasure.strategies.base import EarlierErasure, register
from erasure.strategies.concept_ablation import RELEASED as ABLATION
from erasure.strategies.concept_ablation import ConceptAblation
from erasure.strategies.tasks import Batch, Task
from erasure.training.combining import Combine, Scope, Surgery, Total
from erasure.training.discriminator import Discriminator, DiscriminatorMonitor, Norm, looks_like
from erasure.training.loop import Share
from erasure.training.objectives import matching
from erasure.training.states import Mode
from erasure.training.turns import After, Descent, Turn

if TYPE_CHECKING:
    from accelerate import Accelerator

RELEASED: dict[str, object] = {
    **ABLATION, "steps": 2000, "lr": 4.8e-5, "clip": 0.0, "rollouts": 5, "retain_rollouts": 5, "retain_batch": 8,
    "surgery": "released", "surgery_scope": "tensor", "surgery_strength": 1.0, "retain_added": 0.0,
    "head_start": 0.5005, "first_turn": "student", "discriminator_lr": 1e-4, "discriminator_betas": (0.5, 0.999),
    "discriminator_norm": "batch", "discriminator_told": "latents", "fooling_teaches": True,
}  # fmt: skip
"""Options of the commands in the authors' README for objects and nudity, which run on one GPU."""


@register("doco")
@dataclass(frozen=True, kw_only=True)
class DoCo(ConceptAblation):
    """Train the denoiser until a discriminator cannot tell its outputs for the concept from those for the anchor.

    On states x_t of the anchor's prompt a, with c the same prompt with the concept, r prompts that must survive, e the
    frozen model and x0(.) the clean latents that a prediction implies, every update takes two optimiser steps:

        discriminator:  -log D(x0(e(x_t, a))) - log(1 - D(x0(e_student(x_t, c))))
        student:        -log D(x0(e_student(x_t, c)))         minus the part of the gradient that opposes that
                                                              of |e_student(x'_t, r) - e(x'_t, r)|^2 (PCGrad)

    D is the discriminator's probability that latents were drawn for the anchor. The discriminator is trained alone at
    first. The student thus learns the distribution of images of the anchor, where `concept_ablation` learns each
    single prediction.

    Both steps of an update share one forward pass of the student; retained rows take another, which is left out while
    the discriminator is trained alone. An update needs 3 passes per training state, and none of the teacher on
    `buffer` states, whose predictions are stored. The released recipe makes 162,000 passes: 50,000 for its 1000
    images, 24 in each of its 1000 updates without the student (16 rows of the student, 8 of the teacher) and 88 in
    each of the other updates (which add two backward passes of all 16 rows).

    Here the discriminator also reads the noise level and normalises each row by itself. It is as deep as in the
    released code, and halves the latents' size until it is 4 x 4.

    Presets: `released` is the authors' code with the numbers of their README for objects and nudity, `released-style`
    with those for styles. The gradient surgery of that code is not a projection (see `Surgery`), its discriminator is
    also trained by the student's gradient, which is never set to zero (option `fooling_teaches`), and it normalises by
    the batch. `paper` has the same numbers without these mistakes, because the paper's own numbers were not available.
    Parts that Concept Ablation's presets leave out are left out here too. Where the authors train one concept after
    another, all are trained at once.

    Protects released weights. Attacks that optimise prompts bring much of a concept back (third-party benchmarks).
    """

    title: ClassVar[str] = "adversarial fine-tuning of the denoiser to draw the anchor"
    paper: ClassVar[str] = "DoCo, Wu et al. 2025, arXiv 2405.15304"
    cost: ClassVar[str] = "minutes, about 3 denoiser passes a training state"

    steps: Count = 300
    """Number of updates (released code: 2000). The discriminator is trained in all of them, the student after
    `head_start`."""
    states: Mode = "buffer"
    """Where training states come from. `buffer`: states of the anchor's trajectories, whose predictions are known
    already. `images`: images of the anchor are drawn once, and noised anew for every state (released code).
    `online`: a new trajectory for every state."""
    surgery: Literal["pcgrad", "released", "none"] = "pcgrad"
    """How the student's gradient is kept from opposing the retain loss, see `Surgery`; `none` adds the losses up."""
    surgery_scope: Scope = "tensor"
    """Whether `surgery` compares gradients tensor by tensor, or over all tensors together."""
    surgery_strength: NotNegative = 1.0
    """Share of the opposing part of the gradient, 0 or more, that `surgery` removes (1: all of it)."""
    retain_added: NotNegative = 3.0
    """Weight of the retain loss's own gradient, which is added after the surgery (released code: 0)."""
    head_start: Decay = 0.2
    """Share of the updates, at the start, in which only the discriminator is trained (released code: 0.5)."""
    first_turn: Literal["discriminator", "student"] = "discriminator"
    """Which of the two takes its step first in an update. In the released code the student does, with a
    discriminator that has not taken this update's step."""
    discriminator_lr: Positive = 5e-4
    """Learning rate of the discriminator's Adam."""
    discriminator_betas: tuple[Decay, Decay] = (0.5, 0.999)
    """Decay rates beta_1 and beta_2 of the discriminator's Adam."""
    discriminator_norm: Norm = "group"
    """Normalisation of the discriminator's layers: by groups of channels, or by batch (released code)."""
    discriminator_told: Literal["level", "latents"] = "level"
    """Input of the discriminator: predicted latents and noise level, or predicted latents alone (released code)."""
    fooling_teaches: bool = False
    """Reproduce a mistake of the released code: the student's gradient, which increases the discriminator's loss,
    trains the discriminator as well."""

    presets: ClassVar[Presets] = {
        "paper": {
            **RELEASED, "surgery": "pcgrad", "clip": 1.0, "head_start": 0.5, "first_turn": "discriminator",
            "fooling_teaches": False,
        },
        "released": RELEASED,
        "released-style": {**RELEASED, "discriminator_lr": 5e-4},
    }  # fmt: skip

    @property
    def since(self) -> int:
        """First update in which the student is trained."""
        return round(self.head_start * self.steps)

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.since >= self.steps:
            self.refuse("head_start", self.head_start, "less: the student would never learn")
        if self.accumulation > 1 and self.first_turn == "student":
            self.refuse("first_turn", "student", "'discriminator' where 'accumulation' is above 1")

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        earlier: EarlierErasure | None = None,
    ) -> Task:  # fmt: skip
        """See `TrainedStrategy.task`.

        Raises:
            OptionError: Batch normalisation is chosen and the rows of a batch are on several processes.
        """
        if self.discriminator_norm == "batch" and accelerator.num_processes * self.accumulation > 1:
            self.refuse("discriminator_norm", "batch", "'group' where a batch is computed in several parts")
        return super().task(backbone, tower, concepts, seed, accelerator, earlier)

    def turns(self, task: Task, after: tuple[After, ...]) -> list[Turn[Batch]]:
        """Give the optimiser steps of an update: of the discriminator, and of the student that learns to fool it."""
        channels, *size = task.backbone.latents.shape()
        judge = Discriminator(
            channels, (size[0], size[1]), norm=self.discriminator_norm, told_level=self.discriminator_told == "level",
            seed=task.seed,
        ).to(task.backbone.device)  # fmt: skip
        discriminator = Turn(
            name="discriminator", player=judge, losses=partial(self.judged, task, judge), rate="discriminator_lr",
            descent=Descent(lr=self.discriminator_lr, betas=self.discriminator_betas),
            after=(DiscriminatorMonitor(judge, self.since),),
        )  # fmt: skip
        student = Turn(
            name="student", player=task.student, losses=partial(self.fooled, task, judge), descent=self.descent,
            combine=self.combine(), after=after, since=self.since,
        )  # fmt: skip
        return [discriminator, student] if self.first_turn == "discriminator" else [student, discriminator]

    def combine(self) -> Combine:
        """Choose how the retain loss's gradient is combined with the student's."""
        terms = {"retain": self.retain_batch, "scope": self.scope_weight}
        kept = tuple(name for name, there in terms.items() if there)
        if self.surgery == "none" or not kept:
            return Total()
        return Surgery(kept, self.surgery, self.surgery_scope, self.surgery_strength, self.retain_added)

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """Prepare the states of an update, with a dictionary for results that both steps use."""
        return super().prepare(task, step, share)._replace(extra={})

    def judged(self, task: Task, judge: Discriminator, batch: Batch) -> dict[str, Tensor]:
        """Compute the discriminator's losses."""
        states, drawn = batch.concept, self.drawn(task, batch).detach()
        anchor = judge.judge(clean(task, states.own, states.x, states.t), states.t)
        concept = judge.judge(drawn, states.t)
        errors = judge.errors(anchor, concept)
        terms = {"anchor_judged": errors[0], "concept_judged": errors[1]}
        if self.fooling_teaches and batch.update >= self.since:
            terms["fooling"] = looks_like(concept, 0.0)
        return terms

    def fooled(self, task: Task, judge: Discriminator, batch: Batch) -> dict[str, Tensor]:
        """Compute the student's losses."""
        concept, retained = batch.concept, batch.retained
        terms = {"erase": looks_like(judge.judge(self.drawn(task, batch), concept.t), 0.0)}
        count, end = len(concept.x), len(batch.x)
        if end > count:
            found = self.predict(task, batch.part(slice(count, end)))
            if retained is not None:
                kept = matching(found[: len(retained.x)], self.retained_target(retained))
                terms["retain"] = self.retain_weight * kept
            if self.scope_weight:
                terms["scope"] = self.scope_weight * matching(found[-count:], concept.asked[:, -1])
        return terms

    def drawn(self, task: Task, batch: Batch) -> Tensor:
        """Give the student's clean latents for the concept, computed once for both steps of an update."""
        assert batch.extra is not None
        if "drawn" not in batch.extra:
            states = batch.concept
            with torch.set_grad_enabled(batch.update >= self.since), task.student.active():
                found = self.predict(task, batch.part(slice(len(states.x))))
            batch.extra["drawn"] = clean(task, found, states.x, states.t)
        return batch.extra["drawn"]


def clean(task: Task, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Compute the clean latents that predictions imply, in float32."""
    return task.backbone.parametrisation.clean(prediction.float(), x.float(), t)
