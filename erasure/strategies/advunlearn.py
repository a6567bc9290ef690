"""AdvUnlearn: Defensive Unlearning with Adversarial Training (Zhang et al., NeurIPS 2024, arXiv 2405.15234)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone, TextTower, TowerOutput
from erasure.carriers.edits import Edits
from erasure.carriers.embeddings import injected
from erasure.concept import Concept
from erasure.interop import paths
from erasure.needs import Need
from erasure.options import Count, CountOrZero, NotNegative, PathText, Positive, Presets, ZeroToOne
from erasure.strategies.base import register
from erasure.strategies.prompts import listed_scenes, photo_scenes
from erasure.strategies.trained import Batch, Task, TrainedStrategy
from erasure.training.attack import attacked, prefixed, random_words, vocabulary_spread
from erasure.training.loop import Share
from erasure.training.objectives import matching
from erasure.training.states import Scene, draw, stable_seed
from erasure.training.student import Student, make_student

PAPER: Mapping[str, object] = {
    "base": "null", "against": "base", "eta": 1.0, "rank": 0, "layers": (), "steps": 1000, "lr": 1e-5,
    "weight_decay": 0.0, "warmup": 0, "clip": 0.0, "ema": 0.0, "batch": 1, "templates": False, "contexts": 0,
    "retain_batch": 5, "retain_weight": 0.3, "retain_form": "photos", "retain_vocabulary": 243, "scope_weight": 0.0,
    "states": "online", "rollouts": 1000, "retain_rollouts": 1000, "rollout_steps": 50, "rollout_guidance": 3.0,
    "attack_from": 0.2, "attacked": 1.0, "attack_steps": 30, "attack_lr": 1e-3, "attack_unit": "one",
    "attack_tokens": 1, "attack_signed": False, "attack_accumulates": False,
}  # fmt: skip
"""The command that the authors' README gives for "nudity", and the script's defaults."""


@register("advunlearn")
@dataclass(frozen=True, kw_only=True)
class AdvUnlearn(TrainedStrategy):
    """Train the text encoder against an adversary that looks for words bringing the concept back.

    With T the student's text encoder, e the frozen denoiser and T_0 the stock encoder, on states x_t of trajectories:

        inner:  v* = argmin_v |e(x_t, T(v, c)) - e(x_t, T_0(c))|^2               v: vectors ahead of the prompt c
        outer:  |e(x_t, T(v*, c)) - target|^2 + retain_weight |e(x'_t, T(r)) - e(x'_t, T_0(r))|^2

    with ESD's target (see `ESD`). Nothing but the text encoder changes, so trajectories and targets do not depend on
    the student: they are computed once.

    Presets are the two commands of the authors' README: `paper` against 30 steps of Adam, `fast` with the gradient's
    sign in its place. They train every block and the final norm in full, on the bare name, and roll every state out
    anew; `states="buffer"` with some 50 `rollouts` is a fifteenth of the work. Their 243 prompts "a photo of X" are
    about words of the tokeniser unless `retain_file` names the authors' list of COCO objects.

    Both depart from the released code where that is wrong: a gradient for each attack step, the vectors after the
    last step (`released` and `released-fast` do as the code does), the concept's span in tokens where the code counts
    words, layers by number (its prefix match of "layers.1" takes 10 and 11 too), a seed. Three details of its sampling
    are left out: it asks the denoiser about a state at a random level near the state's own, 47 of 1000 above it on
    average; uses one level for the concept and the retained prompts of an update; and draws those without replacement.

    Protects a hosted pipeline: the denoiser is untouched, so whoever holds the weights can put the stock encoder back,
    `prompt_embeds=` bypasses it, and embeddings learned for the concept bring it back.
    """

    title: ClassVar[str] = "adversarial training of the text encoder"
    paper: ClassVar[str] = "AdvUnlearn, Zhang et al. 2024, arXiv 2405.15234"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories", "one text encoder")
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "minutes, about 10 denoiser passes a training state"

    steps: Count = 150
    """Updates (paper: 1000)."""
    lr: Positive = 3e-4
    """Learning rate of AdamW, constant after the warm-up (paper: 1e-5 for whole parameters)."""
    retain_weight: NotNegative = 3.0
    """Weight of the loss on prompts that must survive (paper: 0.3)."""
    layers: tuple[CountOrZero, ...] = ()
    """Blocks of the text encoder to train, 0 the first; all of them and the final norm when left out."""
    attack_steps: CountOrZero = 4
    """Steps of the adversary in each update (paper: 30); 0 trains without one."""
    attack_lr: Positive = 0.3
    """Learning rate of the adversary's Adam; its unit is `attack_unit`."""
    attack_unit: Literal["spread", "one"] = "spread"
    """Unit of `attack_lr`: the standard deviation of the vocabulary's embeddings, or 1 (paper)."""
    attack_tokens: Count = 1
    """Vectors ahead of the prompt (paper: 1)."""
    attack_signed: bool = False
    """Give Adam the sign of the gradient: fast adversarial training, or with `attack_steps` 1 a single signed step."""
    attack_accumulates: bool = False
    """Do as the released code does by mistake: add the gradients of an attack up, and train on the vectors from before
    its last step."""
    attack_from: ZeroToOne = 0.2
    """Share of the updates before the adversary sets in (paper: 200 of 1000)."""
    attacked: ZeroToOne = 1.0
    """Share of an update's prompts that are attacked."""

    retain_form: Literal["phrasings", "photos"] = "phrasings"
    """Prompts that must survive: the retain lists' phrasings, the empty prompt and `retain_vocabulary` random prompts;
    or `retain_vocabulary` prompts "a photo of X", X of the retain lists and then random words (paper: 243 objects)."""
    retain_file: PathText = ""
    """File of prompts that must survive, in the place of all others: one a line, or a CSV file with a column `prompt`
    (released code: `coco_object_retain.csv`, 243 of them)."""

    presets: ClassVar[Presets] = {
        "paper": PAPER,
        "fast": {**PAPER, "attack_signed": True},
        "released": {**PAPER, "attack_accumulates": True},
        "released-fast": {**PAPER, "attack_signed": True, "attack_accumulates": True},
    }

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow."""
        super().__post_init__()
        if self.rollout_by != "teacher":
            self.refuse(
                "rollout_by", self.rollout_by,
                "'teacher': only the text encoder changes here, so trajectories are the stock model's",
            )  # fmt: skip

    def student(self, backbone: Backbone, tower: TextTower, generator: torch.Generator) -> Student:
        """The chosen blocks of a text encoder.

        Raises:
            NoMatchingModuleError: There is no such block.
        """
        blocks = self.layers or range(len(tower.blocks))
        prefixes = tuple(f"{tower.block_path(layer)}." for layer in blocks)
        if not self.layers:
            prefixes += (f"{tower.norm_path}.",)
        every = paths.canonical_parameters(tower.module)
        chosen = [path for path in every if path.startswith(prefixes)]
        for layer in self.layers:
            paths.require_block(tower.module, tower.block_path(layer), tower.component)
        return make_student(tower.module, chosen, self.rank, generator, f"layers {list(blocks)}")

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """See `TrainedStrategy.retained_scenes`."""
        if self.retain_file:
            return listed_scenes(self.retain_file)
        if self.retain_form == "photos":
            return photo_scenes(tower, concepts, seed, self.retain_vocabulary)
        return super().retained_scenes(tower, concepts, seed)

    def predict(self, task: Task, batch: Batch) -> Tensor:
        """One pass of the denoiser for all rows, with what the text encoder makes of their prompts now."""
        tower, vectors = task.tower, batch.extra
        count = 0 if vectors is None else len(vectors)
        parts = []
        if vectors is not None:
            parts.append(self.encode_attacked(tower, batch.prompts[:count], vectors))
        if count < len(batch.prompts):
            parts.append(tower.encode(tower.tokenize(batch.prompts[count:])))
        told = task.backbone.composed(tower.component, TowerOutput.cat(parts), batch.prompts)
        return task.backbone.predict(batch.x, batch.t, told)

    def encode_attacked(self, tower: TextTower, prompts: list[str], vectors: Tensor) -> TowerOutput:
        """Encode prompts with vectors `(rows, k, dim)` ahead; differentiable in the encoder and in the vectors."""
        tokens, place = prefixed(tower, prompts, vectors.shape[1])
        with injected(tower, place, vectors):
            return tower.encode(tokens)

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """The states of an update, and the adversary's vectors for the first of them."""
        batch = super().prepare(task, step, share)
        count = round(self.attacked * len(batch.concept.x))
        if not self.attack_steps or not count or step < self.attack_from * self.steps:
            return batch
        tower, rows = task.tower, batch.concept.rows(slice(count))
        generator = torch.Generator().manual_seed(stable_seed(task.seed, "adversary", step))
        start = random_words(tower, self.batch, self.attack_tokens, generator)
        loss = partial(self.attack_loss, task, step, share, batch.prompts[:count], rows.scene.cpu())
        with task.student.active():
            found = attacked(
                loss, share.of(start)[:count], steps=self.attack_steps,
                lr=self.attack_lr * (vocabulary_spread(tower) if self.attack_unit == "spread" else 1.0),
                signed=self.attack_signed, accumulates=self.attack_accumulates,
            )  # fmt: skip
        return batch._replace(extra=found)

    def attack_loss(
        self, task: Task, step: int, share: Share, prompts: list[str], scenes: Tensor, vectors: Tensor, turn: int
    ) -> Tensor:
        """How far the attacked prompts are from drawing the concept, at other states of theirs in every turn."""
        rollout = task.concept_states.rollout
        each = rollout.seeds * rollout.steps
        offsets = share.of(draw(each, self.batch, task.seed, "attack", step, turn))[: len(scenes)]
        with torch.no_grad():
            states = task.concept_states.take(scenes * each + offsets)
        encoded = self.encode_attacked(task.tower, prompts, vectors)
        told = task.backbone.composed(task.tower.component, encoded, prompts)
        found = task.backbone.predict(states.x, states.t, told)
        # A sum over rows: each has vectors of its own.
        return matching(found, states.own) * len(found)

    def edits(self, task: Task) -> Edits:
        """Of the text encoder."""
        low_rank = {task.tower.key(path): pair for path, pair in task.student.low_rank().items()}
        return Edits(low_rank, {task.tower.key(path): delta for path, delta in task.student.deltas().items()})

    def idle(self, backbone: Backbone) -> list[nn.Module]:
        """The autoencoder."""
        return [backbone.pipe.vae]
