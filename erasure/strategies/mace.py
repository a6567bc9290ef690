"""MACE: Mass Concept Erasure in Diffusion Models (Lu et al., CVPR 2024, arXiv 2403.06135)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone, EntryLayer, TextTower
from erasure.carriers.attention import AttentionController
from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.layout import Layout
from erasure.concept import Concept
from erasure.needs import Need
from erasure.options import Count, CountOrZero, NotNegative, Positive, Presets, ZeroToOne
from erasure.strategies.base import EarlierErasure, register
from erasure.strategies.closed_form import low_rank, outputs_added, solve
from erasure.strategies.closed_form.entry import telling
from erasure.strategies.denoising import DenoiserStrategy, Method
from erasure.strategies.prompts import anchored, earlier_scenes
from erasure.strategies.subjects import subject
from erasure.strategies.tasks import Batch, Task
from erasure.strategies.uce import UCE
from erasure.text.words import AlignedPrompt, aligned_prompts, telling_places
from erasure.training.cost import DenoiserCost
from erasure.training.images import LEVELS, NoisedImages
from erasure.training.loop import Share
from erasure.training.run import Run
from erasure.training.states import Mode, Scene, States, draw, stable_seed
from erasure.training.student import LowRankStudent, Student, SubsetStudent
from erasure.training.turns import After, Turn

if TYPE_CHECKING:
    from accelerate import Accelerator

FIXED: dict[str, object] = {
    "method": "x-strict", "states": "images", "rollout_by": "teacher", "retain_batch": 0, "retain_rollouts": 1,
    "contexts": 0, "scope_weight": 0.0, "projection": 0.0, "group_lasso": 0.0, "trained_guidance": (),
    "gradient_checkpointing": False,
}  # fmt: skip
"""Options of trained strategies that have only one valid value for this method."""


@dataclass
class MassTask(Task):
    """A training of one LoRA for each concept."""

    words: list[dict[str, Tensor]]
    """Positions of each concept's own tokens in its prompts, `(tokens,)` by prompt."""
    inputs: list[Tensor]
    """Encodings of each concept's tokens and of the words beside it, `(features, dim)` float64."""
    preserved: Tensor
    """Encodings of prompts that must survive, `(features, dim)` float64."""
    shared: Tensor
    """Matrix X of the first closed form, `(dim, dim)` float64: every layer `W` becomes `W + W X`."""
    refined: SubsetStudent
    """The layers after the first closed form, which are not trained further."""
    loras: list[LowRankStudent]
    masks: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Mask of the subject of each picture, `(pictures, 1, h, w)` in the latents' size, 0 or 1."""


@register("mace")
@dataclass(frozen=True, kw_only=True)
class MACE(DenoiserStrategy):
    """Erase many concepts by a closed form, one LoRA per concept against attention to it, and a second closed form.

    1. For keys and values `W` of every cross-attention, with features f of the words beside a concept (the text
       encoder's attention has mixed the concept into them), features a of the same words beside its anchor, and
       features p of prompts that must survive:

           W' = argmin  sum_f |W' f - W a|^2 + retain_weight sum_p |W' p - W p|^2 + lambda |W' - W|^2

    2. For each concept alone, a LoRA `dW_i` is trained on the layers `W'` and on noised images x_t of the concept,
       with the loss

           sum over layers l and the concept's tokens j of |A_l^j * M|_F^2,        A_l^j: attention to token j at x_t

       where the mask M covers the concept in the image. Timesteps t are drawn with probabilities proportional to
       `sigmoid(0.05 (t - 200)) - sigmoid(0.05 (t - 400))`, the timesteps that decide the content of the image.
    3. With features c of each concept and of the words beside it, all LoRAs become one change of each layer:

           W* = argmin  sum_i sum_c |W* c - (W' + dW_i) c|^2 + retain_weight sum_p |W* p - W p|^2 + lambda |W* - W|^2

    The stock model draws the images and locates their subject: the complement of the start token's attention, refined
    by self-attention (the paper uses a segmentation model, Grounded-SAM). For a style the mask is the whole image. The
    LoRAs are independent of one another, and each takes one step in every update. The method needs cross-attention,
    whose keys and values depend on the text alone.

    Preset `paper` has the paper's numbers for objects. The words beside the concept are those of its phrasings, and
    retain lists and random prompts must survive; the paper uses captions of COCO for both.

    Protects released weights.
    """

    title: ClassVar[str] = "closed form, a LoRA a concept that takes attention off it, fused in closed form"
    paper: ClassVar[str] = "MACE, Lu et al. 2024, arXiv 2403.06135"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories", "cross-attention")
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 3 denoiser passes a training state, besides the images"
    asks_null: ClassVar[bool] = False

    method: Method = "x-strict"
    """Layers that are trained: always the keys and values of the cross-attention."""
    rank: CountOrZero = 1
    """Rank of each concept's LoRA (paper: 1)."""
    steps: Count = 50
    """Number of updates; each takes one step for every concept (paper: 50)."""
    lr: Positive = 1e-3
    """Learning rate of AdamW (paper: 1e-5)."""
    batch: Count = 4
    """Number of training states of each concept in an update."""
    states: Mode = "images"
    """Training states: always images that the stock model draws once and that are noised anew for every state,
    because only whole images have a subject to mask."""
    rollouts: Count = 2
    """Number of images of each prompt with a concept (paper: 8 of one prompt)."""
    retain_batch: CountOrZero = 0
    """Number of retained states in an update: always 0, because prompts that must survive are part of the closed
    forms."""
    contexts: CountOrZero = 0
    """Number of random prompts with the concept: always 0, because the images must show the concept alone."""
    retain_vocabulary: CountOrZero = 300
    """Number of random prompts, made of the tokeniser's words, that must survive in addition to the retain lists."""
    retain_weight: NotNegative = 1.0
    """Weight of prompts that must survive in both closed forms."""
    erase_weight: Positive = 10.0
    """Weight of erased features in both closed forms."""
    regularisation: Positive = 0.5
    """Weight lambda of the squared change, in units of the mean square of the features' values."""
    focus: tuple[NotNegative, NotNegative] = (200.0, 400.0)
    """Lower and upper timestep, of 1000, between which most training states are drawn (paper: 200 and 400)."""
    sharpness: Positive = 0.05
    """Steepness of the two sigmoids at these timesteps (paper: 0.05)."""
    tolerance: ZeroToOne = 1e-3
    """Largest relative error of each layer's change that is accepted to make the file smaller; see
    `EntryEdit.tolerance`."""

    presets: ClassVar[Presets] = {
        "paper": {"steps": 50, "lr": 1e-5, "batch": 1, "rollouts": 8, "templates": False, "rollout_steps": 50,
                  "rollout_guidance": 7.5, "erase_weight": 1.0},
    }  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        for name, only in FIXED.items():
            if getattr(self, name) != only:
                self.refuse(name, getattr(self, name), f"{only!r}, for nothing else reads it in this method")
        if not self.rank:
            self.refuse("rank", 0, "1 or more: each concept has a LoRA of its own")
        if not self.focus[0] < self.focus[1]:
            self.refuse("focus", self.focus, "a lower level and then a higher one")

    def ignores_retain(self) -> str:
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return "" if self.retain_weight else "retain_weight"

    def named(self, tower: TextTower, concepts: Sequence[Concept]) -> list[Concept]:
        """Give the concepts with their anchors and with the phrasings that are drawn.

        Raises:
            ConceptError: A concept has no anchor.
        """
        return self.phrased(anchored(tower, concepts, self.name))

    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give prompts with the concepts to draw."""
        pairs = (pair for concept in self.named(tower, concepts) for pair in aligned_prompts(tower, concept))
        return list(dict.fromkeys(Scene(pair.prompt) for pair in pairs))

    def target(self, states: States) -> Tensor:
        """Give no target: the loss is on attention, not on predictions."""
        return states.own

    # What closed forms need ------------------------------------------------------------------------------------------

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        earlier: EarlierErasure | None = None,
    ) -> MassTask:  # fmt: skip
        """Make the training as `TrainedStrategy.task` does, with the first closed form and a LoRA for each concept."""
        usual = super().task(backbone, tower, concepts, seed, accelerator, earlier)
        named = self.named(tower, concepts)
        reader, source = usual.prompts, UCE(vocabulary=self.retain_vocabulary)
        beside, replacing = source.erased_features(reader, "tokens", named, places_beside)
        preserved = source.preserved_features(reader, "tokens", named, seed)
        if earlier is not None:
            prompts = [scene.prompt or "" for scene in earlier_scenes(tower, earlier.concepts, seed, 0)]
            conditioning = [reader.read([prompt])([prompt]).tokens[0] for prompt in prompts]
            runs = backbone.token_runs
            pairs = zip(conditioning, prompts, strict=True)
            preserved = torch.cat([preserved, *(telling(each, runs, p).double().cpu() for each, p in pairs)])
        scale = self.scale(torch.cat([beside, replacing, preserved]))
        shared = solve(beside, replacing, preserved, self.erase_weight, self.retain_weight, scale)
        weights = [f"{layer.path}.weight" for layer in cross_layers(backbone)]
        refined = SubsetStudent(backbone.denoiser, weights).requires_grad_(False)
        for value in refined.values:
            value.add_((value.double().cpu() @ shared).to(value))
        students = [usual.student] + [
            self.student(backbone, tower, torch.Generator().manual_seed(stable_seed(seed, "lora", number)))
            for number in range(1, len(concepts))
        ]
        every = [torch.cat([source.erased_features(reader, "tokens", [concept], place)[0]
                            for place in (places_of, places_beside)]) for concept in named]  # fmt: skip
        return MassTask(
            **vars(usual), preserved=preserved, shared=shared, refined=refined, inputs=every,
            loras=[student for student in students if isinstance(student, LowRankStudent)],
            words=[self.words(backbone, concept) for concept in named],
        )  # fmt: skip

    def scale(self, features: Tensor) -> float:
        """Give the regularisation lambda as a plain number."""
        return self.regularisation * float(features.square().mean())

    def words(self, backbone: Backbone, concept: Concept) -> dict[str, Tensor]:
        """Find the positions of a concept's own tokens among the tokens that the denoiser reads, by prompt."""
        run = backbone.token_runs[0]
        pairs = aligned_prompts(run.tower, concept)
        return {pair.prompt: run.first + places_of(run.tower, pair)[0] for pair in pairs}

    # Pictures and where their subject is -----------------------------------------------------------------------------

    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """Draw the images as `TrainedStrategy.fill` does, and locate the subject of each with the stock model."""
        super().fill(task, model, accelerator)
        made, source = massed(task), pictures(task)
        assert source.clean is not None
        styles = {
            prompt for concept, words in zip(made.concepts, made.words, strict=True) if concept.kind == "style"
            for prompt in words
        }  # fmt: skip
        masks = []
        for scene, clean in zip(source.scenes, source.clean.split(source.rollout.seeds), strict=True):
            covered = scene.prompt in styles
            masks.append(torch.ones_like(clean[:, :1]) if covered else subject(task, str(scene.prompt), clean))
        made.masks = torch.cat(masks).float()

    # Updates ---------------------------------------------------------------------------------------------------------

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """Prepare the rows of each concept, one concept after the other, and the indices of their images."""
        made, source = massed(task), pictures(task)
        numbers = torch.cat([share.of(self.drawn(made, source, number, step)) for number in range(len(made.loras))])
        states = source.take(numbers)
        prompts = [scene.prompt for scene in source.of(states)]
        extra = {"pictures": numbers // LEVELS}
        return Batch(states.x, states.t, states.guidance, prompts, states, None, extra, step)

    def drawn(self, task: MassTask, source: NoisedImages, concept: int, step: int) -> Tensor:
        """Choose the indices of a concept's states in an update, over all processes, `(batch,)`."""
        prompts = task.words[concept]
        scenes = torch.tensor([i for i, scene in enumerate(source.scenes) if scene.prompt in prompts])
        seed = (task.seed, "mace", concept, step)
        scene = scenes[draw(len(scenes), self.batch, *seed, "scene")]
        picture = scene * source.rollout.seeds + draw(source.rollout.seeds, self.batch, *seed, "picture")
        generator = torch.Generator().manual_seed(stable_seed(*seed, "level"))
        level = torch.multinomial(self.importance(source.levels), self.batch, True, generator=generator)
        return picture * LEVELS + level

    def importance(self, t: Tensor) -> Tensor:
        """Give unnormalised probabilities of timesteps, `(levels,)`."""
        low, high = self.focus
        t = t.double().cpu()
        return torch.sigmoid(self.sharpness * (t - low)) - torch.sigmoid(self.sharpness * (t - high))

    def turns(self, task: Task, after: tuple[After, ...]) -> list[Turn[Batch]]:
        """Give one optimiser step for each concept, whose LoRA is independent of the others."""
        return [
            Turn(name=f"concept_{number}", player=lora, losses=partial(self.attention, task, number),
                 descent=self.descent, after=after)
            for number, lora in enumerate(massed(task).loras)
        ]  # fmt: skip

    def attention(self, task: Task, concept: int, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss: attention from the concept's place in its images to the concept's words."""
        made, count = massed(task), len(batch.x) // len(massed(task).loras)
        assert batch.extra is not None
        rows = slice(concept * count, (concept + 1) * count)
        part = batch.part(rows)
        masks = made.masks[batch.extra["pictures"][rows].to(made.masks.device)]
        places = [made.words[concept][str(prompt)] for prompt in part.prompts]
        maps, found = attention_to(task, part, places, made.refined)
        lost = [
            (drawn * F.adaptive_avg_pool2d(masks, (drawn.shape[2], drawn.shape[3]))).square().sum((1, 2, 3))
            for drawn in maps
        ]
        # The prediction is added with weight 0, so that the backward pass covers the whole network and its cost is
        # counted.
        paid = torch.stack(lost).sum(0).mean() + 0 * found.float().sum()
        return {"erase" if len(made.loras) == 1 else f"erase_{concept}": paid}

    def validate(self, task: Task, run: Run, cost: DenoiserCost, update: int) -> None:
        """Draw validation images as `TrainedStrategy.validate` does, with all LoRAs in force at once."""
        with ExitStack() as stack:
            for student in (massed(task).refined, *massed(task).loras[1:]):
                stack.enter_context(student.active())
            super().validate(task, run, cost, update)

    def edits(self, task: Task) -> Edits:
        """Solve the second closed form: one change of each layer that replaces all LoRAs."""
        made = massed(task)
        features = torch.cat([*made.inputs, made.preserved])
        erase, retain = math.sqrt(self.erase_weight), math.sqrt(self.retain_weight)
        inputs, kept, scale = erase * torch.cat(made.inputs), retain * made.preserved, self.scale(features)
        changes: dict[str, LowRank] = {}
        for layer in cross_layers(task.backbone):
            refining = layer.module.weight.detach().double().cpu() @ made.shared
            outputs = torch.cat([
                own @ (refining + change_of(lora, layer.path)).T
                for own, lora in zip(made.inputs, made.loras, strict=True)
            ])  # fmt: skip
            whole = outputs_added(inputs, erase * outputs, kept, scale)
            changes[layer.key] = low_rank(whole, torch.eye(whole.shape[1]).double(), features, self.tolerance)
        return Edits(changes)


def cross_layers(backbone: Backbone) -> list[EntryLayer]:
    """List the keys and values of the cross-attention."""
    return [layer for layer in backbone.entry_layers() if layer.source == "tokens"]


def places_of(tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
    """Give positions of a concept's own tokens in a prompt, and the corresponding positions of the anchor prompt."""
    places = telling_places(tower, pair.prompt)
    places = places[(places <= pair.last) & (pair.positions[places] == pair.positions[pair.last])]
    return places, pair.positions[places]


def places_beside(tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
    """Give the positions of words and padding after a concept; words before it do not depend on it."""
    places = telling_places(tower, pair.prompt)
    places = places[places > pair.last]
    return places, pair.positions[places]


def attention_to(
    task: Task, batch: Batch, places: Sequence[Tensor], student: Student | None = None
) -> tuple[list[Tensor], Tensor]:
    """Compute the image's attention to tokens of its prompt in every cross-attention, and the prediction.

    Args:
        task: The training.
        batch: Rows to predict.
        places: Token positions of each row, `(tokens,)`.
        student: Student that the network is switched to, in addition to the player whose turn it is.

    Returns:
        Attention by layer, `(rows, tokens, grid rows, grid columns)`, zero for missing tokens of a row; and the
        prediction.
    """
    backbone, conditioning = task.backbone, task.prompts(batch.prompts)
    weights = torch.zeros(len(places), conditioning.tokens.shape[1], max(map(len, places)))
    for row, own in enumerate(places):
        weights[row, own, torch.arange(len(own))] = 1
    control = AttentionController(backbone.denoiser, Layout((batch.x.shape[2], batch.x.shape[3]), len(batch.x)))
    control.capture(weights, [site for site in backbone.attention_sites() if site.kind == "cross"])
    with ExitStack() as stack:
        if student is not None:
            stack.enter_context(student.active())
        stack.enter_context(control)
        found = backbone.predict(batch.x, batch.t, conditioning, batch.guidance)
    return list(control.maps.values()), found


def change_of(lora: LowRankStudent, path: str) -> Tensor:
    """Compute what a LoRA adds to the weight of a layer, `(out, dim)` float64."""
    number = lora.paths.index(path)
    return (lora.up[number].detach().double() @ lora.down[number].detach().double()).cpu()


def massed(task: Task) -> MassTask:
    """Check that a task is a training of this strategy."""
    assert isinstance(task, MassTask)
    return task


def pictures(task: Task) -> NoisedImages:
    """Give the images of a training of this strategy."""
    assert isinstance(task.concept_states, NoisedImages)
    return task.concept_states
