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
from erasure.strategies.base import Standing, register
from erasure.strategies.concept_ablation import RELEASED as ABLATION
from erasure.strategies.concept_ablation import ConceptAblation
from erasure.strategies.tasks import Batch, Task
from erasure.training.combining import Combine, Scope, Surgery, Total
from erasure.training.discriminator import Discriminator, Norm, Watch, looks_like
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
"""The commands of the authors' README for objects and nudity, on one GPU."""


@register("doco")
@dataclass(frozen=True, kw_only=True)
class DoCo(ConceptAblation):
    """Train the denoiser until a discriminator takes what it draws for the concept for what it draws for the anchor.

    On states x_t of the anchor's prompt a, with c the same prompt about the concept, e the frozen model and x0(.) the
    clean latents that a prediction implies, in every update:

        discriminator:  -log D(x0(e(x_t, a))) - log(1 - D(x0(e_student(x_t, c))))
        student:        -log D(x0(e_student(x_t, c)))         with what opposes |e_student(x'_t, r) - e(x'_t, r)|^2
                                                              taken out of its gradient, tensor by tensor (PCGrad)

    where D says how likely latents are the anchor's. The discriminator learns alone for a while first. So it is the
    whole of what the anchor draws that is learned, where `concept_ablation` learns each prediction by heart.

    Both turns share one pass of the student, retained rows have one of their own, and none is made of them while the
    discriminator learns alone: 3 passes of a training state, and on `buffer`ed trajectories none of the teacher, whose
    predictions are there. The released recipe makes 50,000 passes for its 1000 images, 24 in each of its 1000 updates
    without the student (16 rows of the student, 8 of the teacher) and 88 in each of the others (two backward passes of
    all 16 rows besides): 162,000.

    Here the discriminator is told the noise level and normalises each row by itself; it is as deep as the code's, and
    halves latents until they are 4 x 4.

    Presets: `released` is the authors' code with their README's numbers for objects and nudity, `released-style` those
    for styles. That code has a surgery that is no projection (see `Surgery`), trains the discriminator with the
    student's own gradient as well (it is never zeroed, so that fooled judgements count as a half: `fooling_teaches`),
    and normalises by the batch. `paper` has the same numbers without these mistakes: the paper's own could not be
    read. What Concept Ablation's presets leave out is left out here too; the sequences of several concepts are trained
    at once.

    Protects released weights. Attacks that optimise prompts bring much of a concept back (third-party benchmarks).
    """

    title: ClassVar[str] = "adversarial fine-tuning of the denoiser to draw the anchor"
    paper: ClassVar[str] = "DoCo, Wu et al. 2025, arXiv 2405.15304"
    cost: ClassVar[str] = "minutes, about 4 denoiser passes a training state"

    steps: Count = 300
    """Updates of the discriminator, and all but the first of the student (released code: 2000)."""
    states: Mode = "buffer"
    """`buffer` takes the states of the anchor's trajectories, whose predictions are there already; `images` draws
    images of the anchor to the end once, and noises them anew for every state (released code); `online` rolls every
    state anew."""
    surgery: Literal["pcgrad", "released", "none"] = "pcgrad"
    """How gradients that undo what must survive are mended, see `Surgery`; `none` adds the losses up."""
    surgery_scope: Scope = "tensor"
    """Whether that is done in each tensor, or in all together."""
    surgery_strength: NotNegative = 1.0
    """Share of the opposed part that is taken out."""
    retain_added: NotNegative = 3.0
    """Weight at which the gradient of what must survive is added itself, besides the surgery (released code: 0)."""
    head_start: Decay = 0.2
    """Share of the updates in which the discriminator learns alone at first (released code: a half)."""
    first_turn: Literal["discriminator", "student"] = "discriminator"
    """Whose turn is first in an update. The released code lets the student go first, which learns from a discriminator
    that does not know its last step."""
    discriminator_lr: Positive = 5e-4
    """Learning rate of its Adam."""
    discriminator_betas: tuple[Decay, Decay] = (0.5, 0.999)
    """Decays of its Adam."""
    discriminator_norm: Norm = "group"
    """What its layers are normalised by: groups of channels, or the batch (released code)."""
    discriminator_told: Literal["level", "latents"] = "level"
    """Whether it is told the noise level, or the predicted latents alone (released code)."""
    fooling_teaches: bool = False
    """Do as the released code does by mistake: the student's gradient, whose aim is to fool it, trains the
    discriminator as well."""

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
        """First update in which the student learns."""
        return round(self.head_start * self.steps)

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow."""
        super().__post_init__()
        if self.since >= self.steps:
            self.refuse("head_start", self.head_start, "less: the student would never learn")
        if self.accumulation > 1 and self.first_turn == "student":
            self.refuse("first_turn", "student", "'discriminator' where 'accumulation' is above 1")

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        standing: Standing | None = None,
    ) -> Task:  # fmt: skip
        """See `TrainedStrategy.task`.

        Raises:
            OptionError: Rows of a batch that is to be normalised are apart from one another.
        """
        if self.discriminator_norm == "batch" and accelerator.num_processes * self.accumulation > 1:
            self.refuse("discriminator_norm", "batch", "'group' where a batch is computed in several parts")
        return super().task(backbone, tower, concepts, seed, accelerator, standing)

    def turns(self, task: Task, after: tuple[After, ...]) -> list[Turn[Batch]]:
        """Two players: the discriminator, and the student that learns to fool it."""
        channels, *size = task.backbone.latents.shape()
        judge = Discriminator(
            channels, (size[0], size[1]), norm=self.discriminator_norm, told_level=self.discriminator_told == "level",
            seed=task.seed,
        ).to(task.backbone.device)  # fmt: skip
        discriminator = Turn(
            name="discriminator", player=judge, losses=partial(self.judged, task, judge), rate="discriminator_lr",
            descent=Descent(lr=self.discriminator_lr, betas=self.discriminator_betas),
            after=(Watch(judge, self.since),),
        )  # fmt: skip
        student = Turn(
            name="student", player=task.student, losses=partial(self.fooled, task, judge), descent=self.descent,
            combine=self.combine(), after=after, since=self.since,
        )  # fmt: skip
        return [discriminator, student] if self.first_turn == "discriminator" else [student, discriminator]

    def combine(self) -> Combine:
        """How what must survive enters."""
        terms = {"retain": self.retain_batch, "scope": self.scope_weight}
        kept = tuple(name for name, there in terms.items() if there)
        if self.surgery == "none" or not kept:
            return Total()
        return Surgery(kept, self.surgery, self.surgery_scope, self.surgery_strength, self.retain_added)

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """The states of an update, and room for what both turns need."""
        return super().prepare(task, step, share)._replace(extra={})

    def judged(self, task: Task, judge: Discriminator, batch: Batch) -> dict[str, Tensor]:
        """The discriminator's losses."""
        states, drawn = batch.concept, self.drawn(task, batch).detach()
        anchor = judge.judge(clean(task, states.own, states.x, states.t), states.t)
        concept = judge.judge(drawn, states.t)
        errors = judge.errors(anchor, concept)
        terms = {"anchor_judged": errors[0], "concept_judged": errors[1]}
        if self.fooling_teaches and batch.update >= self.since:
            terms["fooling"] = looks_like(concept, 0.0)
        return terms

    def fooled(self, task: Task, judge: Discriminator, batch: Batch) -> dict[str, Tensor]:
        """The student's losses."""
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
        """Clean latents that the student predicts for the concept, computed once for both turns of an update."""
        assert batch.extra is not None
        if "drawn" not in batch.extra:
            states = batch.concept
            with torch.set_grad_enabled(batch.update >= self.since), task.student.active():
                found = self.predict(task, batch.part(slice(len(states.x))))
            batch.extra["drawn"] = clean(task, found, states.x, states.t)
        return batch.extra["drawn"]


def clean(task: Task, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Clean latents that predictions imply, in float32."""
    return task.backbone.parametrisation.clean(prediction.float(), x.float(), t)
