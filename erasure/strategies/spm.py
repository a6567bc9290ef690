"""SPM: One-dimensional Adapter to Rule Them All (Lyu et al., CVPR 2024, arXiv 2312.16145)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from erasure.backbones import Backbone, Conditioning, TextTower
from erasure.carriers.edits import Edits
from erasure.carriers.membranes import Membrane, features_of
from erasure.carriers.permeability import PromptGate
from erasure.concept import Concept
from erasure.errors import NoMatchingModuleError
from erasure.interop import paths
from erasure.needs import Need
from erasure.options import Count, CountOrZero, Positive, Presets, ZeroToOne
from erasure.strategies.base import EarlierErasure, register
from erasure.strategies.denoising import BY_COLUMNS, DenoiserStrategy, Method, trained_parameters
from erasure.strategies.negative_guidance import NegativeGuidance
from erasure.strategies.tasks import Batch, Task
from erasure.strategies.transport import prompt_gates
from erasure.training.checkpoint import Stateful
from erasure.training.cost import DenoiserCost
from erasure.training.loop import Share
from erasure.training.run import Run
from erasure.training.states import Scene, StateSource, draw, stable_seed
from erasure.training.student import LowRankStudent, Student, train_columns
from erasure.training.turns import After, Descent, Turn

if TYPE_CHECKING:
    from accelerate import Accelerator

NEAREST = 1e-3
"""Smallest value of 1 - cos in the probability that an anchor is drawn."""

RELEASED: dict[str, object] = {
    "method": "blocks", "rank": 1, "base": "null", "against": "base", "eta": 1.0, "steps": 3000, "lr": 1e-4,
    "weight_decay": 1e-2, "warmup": 500, "cycles": 3, "clip": 0.0, "batch": 1, "templates": False, "contexts": 0,
    "states": "online", "rollouts": 1000, "rollout_steps": 30, "rollout_guidance": 3.0, "rollout_by": "student",
    "anchors": "embeddings", "alpha": 1.0, "retain_batch": 4, "retain_weight": 1000.0, "floor": 0.0,
    "transport": "product", "negatives": "prompt",
}  # fmt: skip
"""Options of configs/pikachu in the released code, which has the paper's values."""


@dataclass
class ConceptTask(Task):
    """The training of one concept's adapter."""

    name: Conditioning
    """Conditioning of the denoiser for the concept's bare name, one row."""
    weights: Tensor
    """Unnormalised probability with which each retained prompt is drawn, `(scenes,)`; empty where anchors are
    embeddings."""


@dataclass
class SPMTask(ConceptTask):
    """A training of this strategy: the training of the first concept, and a list of the trainings of all concepts."""

    parts: list[ConceptTask]
    gates: dict[str, PromptGate]
    """Gates of all concepts, by `denoiser/text encoder`."""

    def sources(self) -> list[StateSource]:
        """List the sources of states of every concept, see `Task.sources`."""
        return [source for part in self.parts for source in Task.sources(part)]


@register("spm")
@dataclass(frozen=True, kw_only=True)
class SPM(DenoiserStrategy, NegativeGuidance):
    """Train a rank-one adapter for each concept, scaled for each prompt by its similarity to the concept.

    Every layer of the transformer blocks gets a branch `up down^T x` (a membrane), which is added to its output. On
    states x_t of trajectories of the concept's prompt c, with the frozen model e and prompts r that must survive
    (latent anchoring), the loss is:

        |e_student(x_t, c) - [e(x_t, b) - eta (e(x_t, c) - e(x_t, b))]|^2 + retain_weight |e_student(x, r) - e(x, r)|^2

    r is chosen with a probability proportional to (1 - cos(E(r), E(c)))^alpha, where E are the text encoders' states.
    When a prompt p is sampled, the adapter is multiplied by the prompt's permeability (facilitated transport, see
    `erasure.carriers.permeability`):

        max(cos(E(p), E(c)), |T(p) & T(c)| / |T(c)|)        T: set of the tokens of the words

    Here the permeability is 0 below a floor that lies above all prompts that must survive, so that the stock model's
    images for these are not changed by a bit. Each prompt of a batch has its own permeability. In a model with several
    text encoders the largest permeability counts. It is 1 for embeddings that no text encoder of the pipeline has
    made. Words that the model's world declares for a concept count as its names.

    Each concept has its own adapter and gate, trained independently of the others, and adapters add up. The base b is
    the same prompt with the anchor, where a concept has one (paper: the empty prompt).

    Presets train on the bare name. In `paper` and `released` the anchors r are random embeddings, about as long as the
    concept's (plus or minus a fifth), at the states of the concept. The permeability has no floor and also applies to
    the rows of negative prompts. `released` multiplies both factors of an adapter by it (the code adds scaled factors
    up), which gives the square of the permeability and, with several concepts, products of factors of different
    concepts. Left out are 8-bit AdamW, images of random sizes, and a fault of the code's sampling: it evaluates a
    state at a timestep that is on average 42 of 1000 above the state's own, and never uses the first state.

    Protects a hosted pipeline: whoever has the weights can leave the branches out.
    """

    title: ClassVar[str] = "rank-one adapters of the denoiser that open as far as a prompt is near the concept"
    paper: ClassVar[str] = "SPM, Lyu et al. 2024, arXiv 2312.16145"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "minutes for each concept, about 5 denoiser passes a training state"
    carriers: ClassVar[tuple[str, ...]] = ("activations",)

    method: Method = "blocks"
    """Layers that get a branch: linear layers, and convolutions with a kernel of one pixel. `blocks` is the paper's
    choice; see `DenoiserStrategy.method` for the others."""
    rank: CountOrZero = 1
    """Rank of each adapter, 1 or more (paper: 1)."""
    steps: Count = 200
    """Number of updates (paper: 3000); each takes one step for every concept."""
    lr: Positive = 1e-3
    """Peak learning rate of AdamW (paper: 1e-4)."""
    cycles: CountOrZero = 0
    """Number of times that the learning rate falls from its peak to zero after the warm-up, each along half a
    cosine (paper: 3); 0 keeps it constant."""
    anchors: Literal["prompts", "embeddings"] = "prompts"
    """Anchors, which must survive: `prompts` are those of retain lists, the empty prompt and `retain_vocabulary`
    random ones, at states of their own; `embeddings` are random embeddings at the concept's states (released code),
    which ignore retain lists."""
    alpha: Annotated[float, Ge(-20), Le(20)] = 1.0
    """Power of (1 - cosine) in the probability of an anchor: positive values prefer anchors far from the concept
    (paper: 1), negative ones prefer near anchors, 0 treats all alike. For `embeddings` it is the probability that a
    random one is accepted."""
    floor: ZeroToOne | None = None
    """Permeability below which an adapter is switched off (paper: 0). When left out: slightly above the
    permeability of all prompts that must survive and of 256 random ones, measured for each concept and text
    encoder."""
    transport: Literal["product", "factors"] = "product"
    """What is multiplied by the permeability: `product` the product of an adapter's factors (paper), `factors` each
    factor (released code)."""
    negatives: Literal["stock", "prompt"] = "stock"
    """Predictions for negative prompts: `stock` those of the stock model, `prompt` with the permeability of the
    prompt that they guide (paper)."""

    presets: ClassVar[Presets] = {"paper": RELEASED, "released": {**RELEASED, "transport": "factors"}}

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if not self.rank:
            self.refuse("rank", 0, "1 or more: a branch beside a layer has factors")
        if self.anchors == "embeddings":
            if self.scope_weight:
                self.refuse("scope_weight", self.scope_weight, "0 where 'anchors' are embeddings")
            if self.projection:
                self.refuse("projection", self.projection, "0 where 'anchors' are embeddings, which are no prompts")
            if self.alpha < 0:
                self.refuse("alpha", self.alpha, "0 or more where 'anchors' are embeddings: a chance of 1 at most")

    @property
    def descent(self) -> Descent:
        """Settings of the AdamW that trains an adapter."""
        return replace(super().descent, cycles=self.cycles)

    def ignores_retain(self) -> str:
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return super().ignores_retain() or ("anchors" if self.anchors == "embeddings" else "")

    # Adapters and their states ---------------------------------------------------------------------------------------

    def student(self, backbone: Backbone, tower: TextTower, generator: torch.Generator) -> Student:
        """Make one concept's adapter, which starts at zero."""
        denoiser = backbone.denoiser
        owners = dict.fromkeys(path.rpartition(".")[0] for path in trained_parameters(backbone, self.method))
        layers = [path for path in owners if features_of(paths.layer(denoiser, path)) is not None]
        if not layers:
            raise NoMatchingModuleError(
                f"no linear layer of {type(denoiser).__name__} matches method {self.method!r}: there would be nothing "
                "to train"
            )
        student = LowRankStudent(denoiser, layers, self.rank, generator)
        if self.method in BY_COLUMNS:
            train_columns(student, {layer.path: layer.columns for layer in backbone.entry_layers()})
        return student

    def students(self, task: Task) -> list[Student]:
        """List the adapters of all concepts, see `LoopedStrategy.students`."""
        return [part.student for part in parts_of(task)]

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give retained prompts, see `TrainedStrategy.retained_scenes`; none where anchors are embeddings."""
        return super().retained_scenes(tower, concepts, seed) if self.anchors == "prompts" else []

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        earlier: EarlierErasure | None = None,
    ) -> SPMTask:  # fmt: skip
        """Make a training for each concept as `TrainedStrategy.task` does, and the gates of all concepts."""
        gates = prompt_gates(
            backbone, concepts, seed, floor=self.floor, retained=self.retain_vocabulary,
            factors=self.transport == "factors", negatives=self.negatives == "prompt",
        )  # fmt: skip
        parts = []
        for concept in concepts:
            usual = super().task(backbone, tower, [concept], seed, accelerator, earlier)
            name = usual.prompts.read([concept.target])([concept.target])
            weights = torch.zeros(0)
            if usual.retain_states is not None:
                conditioning = usual.prompts([scene.prompt for scene in usual.retain_states.scenes])
                weights = anchor_weights(conditioning.tokens, name.tokens, self.alpha)
            parts.append(ConceptTask(**vars(usual), name=name, weights=weights))
        return SPMTask(**{**vars(parts[0]), "concepts": concepts}, parts=parts, gates=gates)

    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """Sample the training states of every concept, see `LoopedStrategy.fill`."""
        for part in parts_of(task):
            super().fill(part, model, accelerator)

    def before(self, task: Task, step: int) -> None:
        """Sample the student's trajectories of every concept again when it is due, see `TrainedStrategy.before`."""
        for part in parts_of(task):
            super().before(part, step)

    def parts(self, task: Task) -> dict[str, Stateful]:
        """Give what a checkpoint contains for every concept, see `TrainedStrategy.parts`."""
        return {
            numbered(name, place): source
            for place, part in enumerate(parts_of(task))
            for name, source in super(SPM, self).parts(part).items()
        }

    # Updates ---------------------------------------------------------------------------------------------------------

    def chosen(self, task: Task, source: StateSource, count: int, name: str, step: int) -> Tensor:
        """Choose states as `TrainedStrategy.chosen` does; anchors by their distance from the concept."""
        if name != "retain":
            return super().chosen(task, source, count, name, step)
        generator = torch.Generator().manual_seed(stable_seed(task.seed, "anchors", step))
        scenes = torch.multinomial(of_concept(task).weights, count, True, generator=generator)
        return scenes * source.per_scene + draw(source.per_scene, count, task.seed, "anchors at", step)

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """Prepare this process's part of every concept's batch."""
        first, *others = [self.prepared(part, step, share) for part in parts_of(task)]
        return first._replace(others=tuple(others))

    def prepared(self, task: ConceptTask, step: int, share: Share) -> Batch:
        """Prepare the states of an update of one concept; random anchors use the concept's states."""
        batch = super().prepare(task, step, share)
        if self.anchors == "prompts" or not self.retain_batch:
            return batch
        rows = share.of(torch.arange(self.retain_batch))
        seeds = [stable_seed(task.seed, "anchors", step, row) for row in rows.tolist()]
        conditioning = random_anchors(task.name, seeds, self.alpha)
        states = batch.concept.rows(torch.arange(len(rows), device=batch.x.device) % len(batch.x))
        with torch.no_grad():
            own = task.backbone.predict(states.x, states.t, conditioning, states.guidance)
        extra = {name: part for name, part in vars(conditioning).items() if part is not None}
        return batch._replace(
            x=torch.cat([batch.x, states.x]), t=torch.cat([batch.t, states.t]),
            guidance=torch.cat([batch.guidance, states.guidance]), retained=states._replace(own=own), extra=extra,
        )  # fmt: skip

    def predict(self, task: Task, batch: Batch) -> Tensor:
        """Run the denoiser once for the rows of the concept and of its anchors."""
        conditioning = task.prompts(batch.prompts)
        if batch.extra is not None:
            conditioning = Conditioning.cat([conditioning, Conditioning(**batch.extra)])
        return task.backbone.predict(batch.x, batch.t, conditioning, batch.guidance)

    def turns(self, task: Task, after: tuple[After, ...]) -> list[Turn[Batch]]:
        """Give one optimiser step for each concept, whose adapter is independent of the others."""
        return [
            Turn(
                name=numbered("student", place), player=part.student,
                losses=partial(self.losses_of, part, place), descent=self.descent,
                after=after if place == 0 else self.after(part),
            )
            for place, part in enumerate(parts_of(task))
        ]  # fmt: skip

    def losses_of(self, task: ConceptTask, place: int, batch: Batch) -> dict[str, Tensor]:
        """Compute the erasing loss and the anchoring loss of one concept."""
        own = (batch, *batch.others)[place]
        return {numbered(name, place): term for name, term in super().losses(task, own).items()}

    def validate(self, task: Task, run: Run, cost: DenoiserCost, update: int) -> None:
        """Draw validation images as `TrainedStrategy.validate` does, with all adapters at full strength."""
        with ExitStack() as stack:
            for student in self.students(task)[1:]:
                stack.enter_context(student.active())
            super().validate(task, run, cost, update)

    # Facilitated transport -------------------------------------------------------------------------------------------

    def figures(self, task: Task) -> dict[str, float]:
        """Measure the figures of `TrainedStrategy.figures`, and the floor of every concept's gate."""
        gates = of_all(task).gates
        floors = {
            f"{concept.target}_floor" + (f"_{key.partition('/')[2]}" if len(gates) > 1 else ""): float(floor)
            for key, gate in gates.items()
            for concept, floor in zip(task.concepts, gate.floor, strict=True)
        }
        return {**super().figures(task), **floors}

    def edits(self, task: Task) -> Edits:
        """Return the adapters of all concepts, and their gates."""
        made, backbone = Edits(gates=of_all(task).gates), task.backbone
        adapters = [student for student in self.students(task) if isinstance(student, LowRankStudent)]
        for number, path in enumerate(adapters[0].paths):
            down, up = (
                torch.stack([getattr(adapter, part)[number].detach().half().cpu() for adapter in adapters])
                for part in ("down", "up")
            )
            branch = Membrane(down, up)
            if branch.acts:
                made.membranes[f"{backbone.denoiser_component}/{path}"] = branch
        return made


# Anchors -------------------------------------------------------------------------------------------------------------


def anchor_weights(conditioning: Tensor, concept: Tensor, alpha: float) -> Tensor:
    """Compute unnormalised probabilities `(1 - cos)^alpha` of prompts as a concept's anchors, `(prompts,)` float64.

    Args:
        conditioning: Conditioning tokens of the prompts, `(prompts, tokens, dim)`.
        concept: Conditioning tokens of the concept's name, `(1, tokens, dim)`.
        alpha: See `SPM.alpha`.
    """
    cosine = torch.cosine_similarity(conditioning.double().flatten(1), concept.double().flatten(1), dim=1)
    # The clamp keeps a prompt that equals the concept, up to rounding, from a probability of 0 or infinity.
    return (1 - cosine).clamp_min(NEAREST).pow(alpha).cpu()


def random_anchors(concept: Conditioning, seeds: Sequence[int], alpha: float) -> Conditioning:
    """Draw random embeddings about as long as a concept's, one per seed; tokens and pooled vectors independently.

    Args:
        concept: Conditioning of the denoiser for the concept's name, one row.
        seeds: Seed of each embedding.
        alpha: See `random_like`.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        pooled = None if concept.pooled is None else random_like(concept.pooled, alpha, generator)
        rows.append(Conditioning(random_like(concept.tokens, alpha, generator), pooled, concept.mask))
    return Conditioning.cat(rows)


def random_like(vector: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw a Gaussian direction at 0.8 to 1.2 times the length of a vector, in its shape.

    A direction is accepted with probability `(1 - cos)^alpha`, at most 1, where cos is between the direction and the
    vector; otherwise another one is drawn.
    """
    length, own = float(vector.double().norm()), vector.double().cpu().flatten()
    while True:
        noise = torch.randn(own.shape, generator=generator, dtype=torch.float64)
        cosine = torch.cosine_similarity(own, noise, dim=0)
        if torch.rand((), generator=generator) < (1 - cosine) ** alpha:
            break
    scale = 0.8 + 0.4 * torch.rand((), generator=generator, dtype=torch.float64)
    return (scale * length * noise / noise.norm()).view(vector.shape).to(vector)


# Trainings -----------------------------------------------------------------------------------------------------------


def numbered(name: str, place: int) -> str:
    """Name a part of one concept's training; parts of the first concept keep the plain name."""
    return f"{name}_{place}" if place else name


def of_all(task: Task) -> SPMTask:
    """Check that a task is a training of this strategy."""
    assert isinstance(task, SPMTask)
    return task


def of_concept(task: Task) -> ConceptTask:
    """The training of one concept's adapter."""
    assert isinstance(task, ConceptTask)
    return task


def parts_of(task: Task) -> list[ConceptTask]:
    """List the trainings of all concepts, or the given training of one concept."""
    return task.parts if isinstance(task, SPMTask) else [of_concept(task)]
