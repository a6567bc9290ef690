"""SFD: Score Forgetting Distillation (Chen et al., ICLR 2025, arXiv 2409.11219)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from erasure import files
from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits, LowRank
from erasure.concept import Concept
from erasure.errors import ArtifactError, OptionError, UnsupportedModelError
from erasure.interop.one_step import sampled_once
from erasure.needs import Need
from erasure.options import Count, CountOrZero, Decay, NotNegative, PathText, Positive, Presets, ZeroToOne
from erasure.strategies.base import EarlierErasure, Fit, Way, register
from erasure.strategies.denoising import Method, beside_denoiser, denoiser_student
from erasure.strategies.looped import LoopedStrategy
from erasure.strategies.prompts import concept_scenes
from erasure.strategies.tasks import Task
from erasure.text.encodings import Reader
from erasure.training.cost import DenoiserCost
from erasure.training.distillation import Drawn, Guiding, Kind, ScoreDistillation
from erasure.training.generator import OneStepGenerator
from erasure.training.loop import Share
from erasure.training.run import Run
from erasure.training.states import Scene
from erasure.training.student import LowRankStudent, Student
from erasure.training.turns import After, Descent, Turn
from erasure.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator

LORA_FILE = "pytorch_lora_weights.safetensors"
"""File name of a LoRA in diffusers."""
RELEASED: dict[str, object] = {
    "rank": 0, "method": "all", "batch": 8, "retain_batch": 8, "lr": 1e-6, "fake_lr": 3e-6, "betas": (0.0, 0.999),
    "steps": 12_500, "alpha": 1.0, "level": 625, "levels": (20, 980), "teacher_guidance": 4.5, "fake_guidance": 4.5,
    "learning_guidance": 4.5, "dropped": 0.1, "forget_weight": 0.01, "retain_weight": 1.0, "head_start": 0.0,
    "anchor_start": False, "contexts": 0, "clip": 0.0,
}  # fmt: skip
"""Options of the released code for Stable Diffusion 1.5."""
COPYING, WAITING = 0.8, 0.18
"""Share of the updates of a head start in which the generator copies the anchor, and of one in which it waits."""


@dataclass
class Distillation(Task):
    """A training of a generator, and of a second network that models the generator's images."""

    method: ScoreDistillation


@register("sfd")
@dataclass(frozen=True, kw_only=True)
class SFD(LoopedStrategy):
    """Distil the model into a one-step generator that draws the anchor when it is prompted with the concept.

    Two low-rank changes of one frozen model are trained. The model's clean latents are f(x_t, c). The generator x =
    G(z, c) draws from noise z in one step, and the fake-score network g(x_t, c) models the generator's images. In
    every update, on prompts c of the concept and prompts r that must survive:

        fake:       |g(x_t, c) - x|^2 in the model's own parametrisation, on generated images for c and for r
        generator:  (f(x_t, a) - g(x_t, c)) [(f(x_t, a) - x) - alpha (f(x_t, a) - g(x_t, c))] / mean |x - f(x_t, a)|
                    with the same prompt about the anchor as a; and with a = c = r on prompts that must survive

    The generator's gradient flows through x, f and g. The loss is the score identity distance (Zhou et al. 2024)
    between generated images for the concept and the model's images for the anchor.

    This loss alone takes so many updates to move from the concept to the anchor that other images lose their style
    meanwhile. So in the head start the generator first learns, with G0 the generator as it starts,

        copying:    |G(z, c) - G0(z, a)|^2, and |G(z, r) - G0(z, r)|^2 on prompts that must survive

    which is our addition (`anchor_start`), and left out where a concept is a style.

    The result is a one-step generator, and its config says so: attaching it gives the pipeline a sampler of one step
    at `level`, whatever number of steps a call asks for, and switches guidance off; taking it off restores the
    pipeline's own sampler. No other edit of the denoiser can be in force at the same time. With `start` the generator
    is initialised from another one, such as the embedded `canvas-turbo`, and only has to forget (two stages);
    otherwise it also learns to draw in one step.

    Presets have the released code's numbers for Stable Diffusion 1.5: whole parameters, 8 prompts per update, 100,000
    images. `paper` weights the forgetting loss by 0.01, as the paper does for class forgetting and as the code's
    default is; `released` by 1, as its run script. The code differs in two ways: it multiplies the generator's noise
    by the noise scale of the level (0.95 at 625; stock pipelines use 1, which is trained here), and it clips each
    entry of the gradient in half precision.

    Protects released weights against prompts. The result does not contain weights that draw in many steps.
    """

    title: ClassVar[str] = "distillation into a one-step generator that forgets"
    paper: ClassVar[str] = "SFD, Chen et al. 2024, arXiv 2409.11219"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories", "one step")
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 9 denoiser passes an image"

    steps: Count = 50
    """Number of updates (released code: 12500)."""
    lr: Positive = 1e-3
    """Learning rate of the generator's Adam."""
    batch: Count = 4
    """Number of images of the concept in each update, over all processes."""
    retain_batch: CountOrZero = 6
    """Number of images of prompts that must survive in each update, over all processes."""
    retain_weight: NotNegative = 1.0
    """Weight of the losses on prompts that must survive."""
    method: Method = "all"
    """Layers that both networks change, see `ESD.method`."""
    start: PathText = ""
    """LoRA of a one-step generator from which this one is initialised, in diffusers' format: its file, its folder,
    or the name of an embedded one (`canvas-turbo`). When left out, the generator starts as the model itself."""
    forget_weight: NotNegative = 1.0
    """Weight of the generator's loss on the concept's prompts (paper: 0.01)."""
    alpha: NotNegative = 1.2
    """Coefficient alpha of the generator's loss (paper: 1.2 for CIFAR-10, 1 for Stable Diffusion)."""
    level: Count = 900
    """Timestep of the generator's one step, of 1000 (paper: 440 for CIFAR-10, 625 for Stable Diffusion)."""
    levels: tuple[Count, Count] = (20, 980)
    """First timestep (inclusive) and last timestep (exclusive) to which images are noised in training."""
    fake_lr: Positive = 2e-3
    """Learning rate of the fake-score network's Adam (released code: 3e-6)."""
    betas: tuple[Decay, Decay] = (0.0, 0.999)
    """Decay rates beta_1 and beta_2 of both Adam optimisers."""
    head_start: Decay | None = None
    """Share of the updates, at the start, in which the fake-score network is trained, and the generator is not yet
    trained by its own loss, see `anchor_start` (released code: 0). When left out, 0.8 where the generator copies the
    anchor meanwhile, and 0.18 where it waits."""
    anchor_start: bool | None = None
    """In the head start, train the generator to draw for the concept what it drew for the anchor at first, from the
    same noise, and for prompts that must survive what it drew for them. When off, the generator waits (released code:
    there is no head start). When left out, it is on unless a concept is a style: copies of an anchor have its things,
    and not its style."""
    teacher_guidance: NotNegative = 2.0
    """Guidance scale of the frozen model, whose guided predictions the unguided generator learns (SD 1.5: 4.5)."""
    fake_guidance: NotNegative = 1.0
    """Guidance scale of the fake-score network in the generator's loss (SD 1.5: 4.5)."""
    learning_guidance: NotNegative = 1.0
    """Guidance scale of the fake-score network in its own loss (SD 1.5: 4.5)."""
    dropped: ZeroToOne = 0.1
    """Share of the fake-score network's rows that are trained with the empty prompt, where one of its guidance
    scales is not 1."""

    presets: ClassVar[Presets] = {"paper": RELEASED, "released": {**RELEASED, "forget_weight": 1.0}}

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.levels[0] >= self.levels[1]:
            self.refuse("levels", self.levels, "a lower and a higher noise level")
        if self.head_start is not None and int(self.head_start * self.steps) >= self.steps:
            self.refuse("head_start", self.head_start, "less: the generator would never learn")
        if not self.retain_batch:
            self.refuse("retain_batch", 0, "1 or more: a generator of one step has everything to learn")
        if self.start and not self.rank:
            self.refuse("start", self.start, "'' without a LoRA of its own: raise 'rank'")

    def beginning(self, concepts: Sequence[Concept]) -> tuple[bool, int]:
        """Give whether the generator copies the anchor first, and the first update of its own loss."""
        copies = self.anchor_start
        if copies is None:
            copies = all(concept.kind != "style" for concept in concepts)
        share = self.head_start
        if share is None:
            share = COPYING if copies else WAITING
        return copies, int(share * self.steps)

    def ignores_retain(self) -> str:
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return "" if self.retain_weight else "retain_weight"

    def adds(self, earlier: Sequence[str]) -> Way:
        """Fit all concepts anew, see `Strategy.adds`; only an erasure by this method can be added to."""
        if others := sorted(set(earlier) - {self.name}):
            raise UnsupportedModelError(
                f"sfd makes the model a one-step generator, and {others[0]} edits one of many steps: what both make "
                "of it is neither. Erase all concepts with one of them"
            )
        return "anew"

    # Players ---------------------------------------------------------------------------------------------------------

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        earlier: EarlierErasure | None = None,
    ) -> Distillation:  # fmt: skip
        """Make the prompts, both networks, and the generator's settings.

        Raises:
            OptionError: The model does not have a timestep, or `start` is not a LoRA of a one-step generator.
        """
        count = len(backbone.parametrisation.cumulative) if hasattr(backbone.parametrisation, "cumulative") else 0
        for name, highest in (("level", self.level), ("levels", self.levels[1] - 1)):
            if highest >= count:
                self.refuse(name, getattr(self, name), f"below {count}, the noise levels of this model")
        scenes, kept = self.scenes(tower, concepts, seed), self.retained_scenes(tower, concepts, seed)
        prompts = Reader(backbone).read(
            ["", *(text for each in (*scenes, *kept) for text in (each.prompt, *each.asks))]
        )
        generator, fake = (
            denoiser_student(backbone, self.method, self.rank, torch.Generator().manual_seed(each))
            for each in (seed, seed + 1)
        )
        copies, since = self.beginning(concepts)
        first = None
        if self.start:
            changes = read_lora(self.start)
            begin(generator, backbone, changes)
            if copies:
                first = denoiser_student(backbone, self.method, self.rank, torch.Generator()).requires_grad_(False)
                begin(first, backbone, changes)
        concept, retained = (
            OneStepGenerator(backbone, each, prompts, generator, self.level, self.levels, seed)
            for each in (scenes, kept)
        )
        method = ScoreDistillation(
            kinds=[
                Kind("forget", concept, self.batch, self.forget_weight, self.forget_weight),
                Kind("retain", retained, self.retain_batch, self.retain_weight, self.retain_weight),
            ],
            generator=generator, fake=fake, alpha=self.alpha, seed=seed, since=since,
            copying=copies, first=first,
            guiding=Guiding(
                teacher=self.teacher_guidance, fake=self.fake_guidance, learning=self.learning_guidance,
                dropped=self.dropped,
            ),
        )  # fmt: skip
        return Distillation(backbone, tower, concepts, seed, prompts, generator, concept, retained, method)

    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give prompts with the concepts, each with the anchor's prompt for which the frozen model predicts."""
        named = self.phrased(concepts)
        return concept_scenes(tower, named, seed, self.contexts, anchored=True, scope=False)

    def turns(self, task: Task, after: tuple[After, ...]) -> list[Turn[Drawn]]:
        """Give the optimiser steps of an update: of the fake-score network, then of the generator."""
        fake = replace(self.descent, lr=self.fake_lr, ema=0.0)
        return distilled(task).method.turns(self.descent, fake)

    def students(self, task: Task) -> Sequence[Student]:
        """List both networks."""
        method = distilled(task).method
        return [method.generator, method.fake]

    @property
    def descent(self) -> Descent:
        """Settings of the generator's Adam."""
        return replace(super().descent, betas=self.betas)

    def prepare(self, task: Task, step: int, share: Share) -> Drawn:
        """Draw the generator's images of an update."""
        return distilled(task).method.prepare(step, share)

    # Around them ----------------------------------------------------------------------------------------------------

    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """Do nothing: images are drawn in each update."""

    def edits(self, task: Task) -> Edits:
        """Return the edits of the generator; the fake-score network is dropped."""
        return task.student.edits(task.backbone.denoiser_component)

    def idle(self, backbone: Backbone) -> list[nn.Module]:
        """Return the components that training does not run, see `beside_denoiser`."""
        return beside_denoiser(backbone)

    def validate(self, task: Task, run: Run, cost: DenoiserCost, update: int) -> None:
        """Draw validation images as `LoopedStrategy.validate` does, in one step and without guidance."""
        if run.folder is not None:
            with sampled_once(task.backbone.pipe, self.level), task.student.active(), torch.no_grad(), cost.paused():
                task.draw(run.folder / "validation", update, 1, self.idle(task.backbone), guidance=1.0)

    def train(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None],
        run: Run, earlier: EarlierErasure | None = None,
    ) -> Fit:  # fmt: skip
        """Train as `LoopedStrategy.train` does, and mark the result as a one-step generator."""
        fit = super().train(backbone, concepts, seed=seed, progress=progress, run=run, earlier=earlier)
        return fit._replace(level=self.level)


def distilled(task: Task) -> Distillation:
    """Check that a task is a training of this strategy."""
    assert isinstance(task, Distillation)
    return task


def read_lora(source: str) -> dict[str, LowRank]:
    """Read the changes of a LoRA by layer, `component/module.path`.

    Args:
        source: The LoRA's file, its folder, or the name of an embedded one.

    Raises:
        ArtifactError: The file is damaged.
        OptionError: The file does not exist, or is not a LoRA.
    """
    path = Path(source)
    if not path.exists() and (embedded := World.embedded(source)) is not None:
        path = embedded
    path = path / LORA_FILE if path.is_dir() else path
    if not path.is_file():
        raise OptionError(
            f"option 'start' is {source!r}, and there is no LoRA {path}: give its .safetensors file, a folder with "
            f"{LORA_FILE}, or 'canvas-turbo'"
        )
    try:
        edits = Edits.from_state_dicts({}, files.read_tensors(path))
    except ArtifactError as error:
        raise OptionError(
            f"option 'start' is {source!r}, which is no LoRA of a one-step generator: {error}"
        ) from error
    edits.check()
    return edits.low_rank


@torch.no_grad()
def begin(student: Student, backbone: Backbone, changes: Mapping[str, LowRank]) -> None:
    """Initialise a student from a LoRA; the student's rank may be higher.

    Args:
        student: Student that equals the stock model so far.
        backbone: Model whose denoiser the student changes.
        changes: Low-rank changes by layer, `component/module.path`.

    Raises:
        OptionError: The LoRA has a layer that the student does not change, another shape, or a higher rank.
    """
    assert isinstance(student, LowRankStudent)
    own = {
        f"{backbone.denoiser_component}/{path}": factors
        for path, *factors in zip(student.paths, student.down, student.up, strict=True)
    }
    for key, change in changes.items():
        if key not in own:
            raise OptionError(
                f"option 'start' names a LoRA that changes {key}, which is not trained: set 'method' to 'all', or "
                "take a LoRA for this model"
            )
        down, up = own[key]
        rank = len(change.down)
        if change.down.shape[1] != down.shape[1] or change.up.shape[0] != up.shape[0]:
            raise OptionError(f"option 'start' names a LoRA for another model: {key} has other widths there")
        if rank > len(down):
            raise OptionError(f"option 'rank' is {len(down)}, and the LoRA to start from has {rank}: set it to {rank}")
        down[:rank] = change.down.to(down)
        up[:, :rank] = change.up.to(up)
