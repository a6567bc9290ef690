"""AdvUnlearn: Defensive Unlearning with Adversarial Training (Zhang et al., NeurIPS 2024, arXiv 2405.15234)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone, Conditioning, TextTower, TowerOutput
from erasure.carriers.edits import Edits
from erasure.carriers.embeddings import injected
from erasure.concept import Concept
from erasure.errors import NoMatchingModuleError
from erasure.interop import paths
from erasure.needs import Need
from erasure.options import Count, CountOrZero, NotNegative, PathText, Positive, Presets, ZeroToOne
from erasure.strategies.base import register
from erasure.strategies.negative_guidance import NegativeGuidance
from erasure.strategies.prompts import listed_scenes, photo_scenes
from erasure.strategies.tasks import Batch, Task
from erasure.training.attack import attacked, prefixed, random_words, vocabulary_spread
from erasure.training.loop import Share
from erasure.training.objectives import matching
from erasure.training.states import Scene, draw, stable_seed
from erasure.training.student import Student, make_student

Component = Literal["text_encoder", "text_encoder_2", "text_encoder_3"]
"""Name of a text encoder in the pipelines of diffusers."""

PAPER: Mapping[str, object] = {
    "base": "null", "against": "base", "eta": 1.0, "rank": 0, "layers": (), "steps": 1000, "lr": 1e-5,
    "weight_decay": 0.0, "warmup": 0, "clip": 0.0, "ema": 0.0, "batch": 1, "templates": False, "contexts": 0,
    "retain_batch": 5, "retain_weight": 0.3, "retain_form": "photos", "retain_vocabulary": 243, "scope_weight": 0.0,
    "states": "online", "rollouts": 1000, "retain_rollouts": 1000, "rollout_steps": 50, "rollout_guidance": 3.0,
    "attack_from": 0.2, "attacked": 1.0, "attack_steps": 30, "attack_lr": 1e-3, "attack_unit": "one",
    "attack_tokens": 1, "attack_signed": False, "attack_accumulates": False, "text_encoders": (),
}  # fmt: skip
"""Options of the command that the authors' README gives for "nudity", and defaults of their script."""


@register("advunlearn")
@dataclass(frozen=True, kw_only=True)
class AdvUnlearn(NegativeGuidance):
    """Train the text encoders against an adversary that searches for embeddings which bring the concept back.

    T are the text encoders in training, T_0 the stock text encoders, e is the frozen denoiser, c is a prompt with the
    concept and r is a prompt that must survive. On states x_t of denoising trajectories:

        inner:  v* = argmin_v |e(x_t, T(v, c)) - e(x_t, T_0(c))|^2               v: vectors ahead of the prompt c
        outer:  |e(x_t, T(v*, c)) - target|^2 + retain_weight |e(x'_t, T(r)) - e(x'_t, T_0(r))|^2

    The target is that of ESD (see `ESD`). Only the text encoders change, so trajectories and targets do not depend on
    the training and are computed once. Where the denoiser reads several text encoders, all of them are trained, each
    with its own adversarial embeddings; e reads the tokens and the pooled vectors of all of them.

    Presets are the two commands of the authors' README: `paper` attacks with 30 steps of Adam, `fast` with signed
    gradient steps. Both train every block and the final norm in full, use only the bare name of the concept, and
    compute a new trajectory for every state; `states="buffer"` with about 50 `rollouts` needs a fifteenth of the work.
    Their 243 retained prompts "a photo of X" are made from random words of the tokeniser unless `retain_file` names
    the authors' list of COCO objects.

    Both presets correct mistakes of the released code. They compute a new gradient for each attack step and train on
    the embeddings after the last step (`released` and `released-fast` do as the code does), they count the span of the
    concept in tokens where the code counts words, they choose layers by number (the code's prefix "layers.1" also
    matches 10 and 11), and they are seeded. Three details of the code's sampling are left out: it evaluates the
    denoiser at a random timestep near the state's own, on average 47 of 1000 above it; it uses one timestep for the
    concept and the retained prompts of an update; and it draws both without replacement.

    Protects a hosted pipeline: the denoiser is not changed, so whoever has the weights can use the stock text encoder
    again, `prompt_embeds=` bypasses the erasure, and embeddings learned for the concept bring it back.
    """

    title: ClassVar[str] = "adversarial training of the text encoders"
    paper: ClassVar[str] = "AdvUnlearn, Zhang et al. 2024, arXiv 2405.15234"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "minutes, about 11 denoiser passes a training state"
    moves_null: ClassVar[bool] = False

    steps: Count = 150
    """Number of updates (paper: 1000)."""
    lr: Positive = 3e-4
    """Learning rate of AdamW, constant after the warm-up (paper: 1e-5, without a LoRA)."""
    retain_weight: NotNegative = 3.0
    """Weight of the loss on prompts that must survive (paper: 0.3)."""
    text_encoders: tuple[Component, ...] = ()
    """Text encoders to attack and to train, named by their pipeline components; all text encoders that the denoiser
    reads when left out. The other text encoders stay as they are, and the denoiser still reads them."""
    layers: tuple[CountOrZero, ...] = ()
    """Transformer blocks of each of those text encoders to train, counted from 0; when left out, all blocks that
    the denoiser's input depends on, and the final norm."""
    attack_steps: CountOrZero = 4
    """Number of adversary steps in each update (paper: 30); 0 trains without an adversary."""
    attack_lr: Positive = 0.3
    """Learning rate of the adversary's Adam; its unit is `attack_unit`."""
    attack_unit: Literal["spread", "one"] = "spread"
    """Unit of `attack_lr`: the standard deviation of the vocabulary's embeddings, or 1 (paper)."""
    attack_tokens: Count = 1
    """Number of adversarial embeddings before the prompt's words in each text encoder (paper: 1)."""
    attack_signed: bool = False
    """Use only the sign of the gradient in the adversary's Adam (fast adversarial training); with `attack_steps` 1
    this is a single signed step."""
    attack_accumulates: bool = False
    """Reproduce a mistake of the released code: add up the gradients of all steps of an attack, and train on the
    embeddings from before its last step."""
    attack_from: ZeroToOne = 0.2
    """Share of the updates, 0 to 1, that are made before the adversary starts (paper: 200 of 1000)."""
    attacked: ZeroToOne = 1.0
    """Share of the prompts of each update, 0 to 1, that are attacked."""

    retain_form: Literal["phrasings", "photos"] = "phrasings"
    """Prompts that must survive. `phrasings`: the phrasings of the retain lists, the empty prompt and
    `retain_vocabulary` random prompts. `photos`: `retain_vocabulary` prompts "a photo of X", where X are the names
    of the retain lists and then random words (paper: 243 objects)."""
    retain_file: PathText = ""
    """File of prompts that must survive, used instead of all other retained prompts: one prompt per line, or a CSV
    file with a column `prompt` (released code: `coco_object_retain.csv` with 243 prompts)."""

    presets: ClassVar[Presets] = {
        "paper": PAPER,
        "fast": {**PAPER, "attack_signed": True},
        "released": {**PAPER, "attack_accumulates": True},
        "released-fast": {**PAPER, "attack_signed": True, "attack_accumulates": True},
    }

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.rollout_by != "teacher":
            self.refuse(
                "rollout_by", self.rollout_by,
                "'teacher': only text encoders change here, so trajectories are the stock model's",
            )  # fmt: skip

    def attacked_towers(self, backbone: Backbone) -> list[TextTower]:
        """The text encoders that are attacked and trained.

        Raises:
            OptionError: The pipeline has no text encoder of a given name.
        """
        towers = {tower.component: tower for tower in backbone.towers}
        if lacking := [name for name in self.text_encoders if name not in towers]:
            self.refuse("text_encoders", lacking, f"those of the pipeline: {', '.join(towers)}")
        return [tower for name, tower in towers.items() if name in (self.text_encoders or towers)]

    def student(self, backbone: Backbone, tower: TextTower, generator: torch.Generator) -> Student:
        """Make the trainable student: the chosen blocks of the chosen text encoders.

        Raises:
            NoMatchingModuleError: A chosen block does not exist, or the denoiser's input does not depend on it.
            OptionError: The pipeline has no text encoder of a given name.
        """
        towers = self.attacked_towers(backbone)
        # One network holds all text encoders, so the paths of its parameters begin with the component's name.
        network = nn.ModuleDict({each.component: each.root for each in towers})
        chosen = [f"{each.component}.{path}" for each in towers for path in self.trained_parameters(each)]
        return make_student(network, chosen, self.rank, generator, f"layers {list(self.layers)}")

    def trained_parameters(self, tower: TextTower) -> list[str]:
        """Paths of the trained parameters of a text encoder.

        Raises:
            NoMatchingModuleError: See `student`.
        """
        for layer in self.layers:
            if layer >= len(tower.blocks):
                raise NoMatchingModuleError(
                    f"{tower.component} has {len(tower.blocks)} blocks and no {tower.block_path(layer)}: choose lower "
                    f"numbers in 'layers', or leave {tower.component} out of 'text_encoders'"
                )
            if layer >= tower.depth:
                raise NoMatchingModuleError(
                    f"the denoiser reads states of {tower.component} from ahead of its block {layer}: choose blocks "
                    f"below {tower.depth} in 'layers', or leave {tower.component} out of 'text_encoders'"
                )
        prefixes = tuple(f"{tower.block_path(layer)}." for layer in self.layers or range(tower.depth))
        if not self.layers and tower.passes_norm:
            prefixes += (f"{tower.norm_path}.",)
        return [path for path in paths.canonical_parameters(tower.module) if path.startswith(prefixes)]

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give the prompts that must survive, see `TrainedStrategy.retained_scenes`."""
        if self.retain_file:
            return listed_scenes(self.retain_file)
        if self.retain_form == "photos":
            return photo_scenes(tower, concepts, seed, self.retain_vocabulary)
        return super().retained_scenes(tower, concepts, seed)

    def predict(self, task: Task, batch: Batch) -> Tensor:
        """Run the denoiser once for all rows, on prompts encoded by the text encoders in training."""
        prompts = [prompt or "" for prompt in batch.prompts]
        return task.backbone.predict(
            batch.x, batch.t, conditioning_of(task.backbone, prompts, batch.extra), batch.guidance
        )

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """Gather the states of an update, and run the adversary for the first of them."""
        batch = super().prepare(task, step, share)
        count = round(self.attacked * len(batch.concept.x))
        if not self.attack_steps or not count or step < self.attack_from * self.steps:
            return batch
        towers, rows = self.attacked_towers(task.backbone), batch.concept.rows(slice(count))
        prompts = [prompt or "" for prompt in batch.prompts[:count]]
        generator = torch.Generator().manual_seed(stable_seed(task.seed, "adversary", step))
        start = {
            tower.component: share.of(random_words(tower, self.batch, self.attack_tokens, generator))[:count]
            for tower in towers
        }
        units = {
            tower.component: vocabulary_spread(tower) if self.attack_unit == "spread" else 1.0 for tower in towers
        }
        loss = partial(self.attack_loss, task, step, share, prompts, rows.scene.cpu())
        with task.student.active():
            found = attacked(
                loss, start, steps=self.attack_steps, signed=self.attack_signed, accumulates=self.attack_accumulates,
                lr={component: self.attack_lr * unit for component, unit in units.items()},
            )  # fmt: skip
        return batch._replace(extra=found)

    def attack_loss(
        self, task: Task, step: int, share: Share, prompts: list[str], scenes: Tensor, vectors: Mapping[str, Tensor],
        turn: int,
    ) -> Tensor:  # fmt: skip
        """The adversary's loss: distance from the stock predictions for the concept, summed over rows.

        Every step of the adversary (`turn`) uses other states of the same prompts.
        """
        each = task.concept_states.per_scene
        offsets = share.of(draw(each, self.batch, task.seed, "attack", step, turn))[: len(scenes)]
        with torch.no_grad():
            states = task.concept_states.take(scenes * each + offsets)
        found = task.backbone.predict(
            states.x, states.t, conditioning_of(task.backbone, prompts, vectors), states.guidance
        )
        # The loss is summed over rows because each row has its own adversarial embeddings.
        return matching(found, states.own) * len(found)

    def edits(self, task: Task) -> Edits:
        """Return the changes of the text encoders' parameters."""
        low_rank, deltas = task.student.low_rank(), task.student.deltas()
        return Edits(
            {path.replace(".", "/", 1): pair for path, pair in low_rank.items()},
            {path.replace(".", "/", 1): delta for path, delta in deltas.items()},
        )

    def idle(self, backbone: Backbone) -> list[nn.Module]:
        """Return the autoencoder, which training does not run."""
        return [backbone.pipe.vae]


def conditioning_of(backbone: Backbone, prompts: list[str], vectors: Mapping[str, Tensor] | None) -> Conditioning:
    """Encode prompts as the denoiser's conditioning, differentiable in text encoders and adversarial embeddings.

    Args:
        backbone: The model.
        prompts: Prompts that all text encoders read.
        vectors: Adversarial embeddings before the words of the first prompts, by text encoder, `(rows, k, dim)`.
    """
    given = vectors or {}
    return backbone.compose(
        {tower.component: encoded(tower, prompts, given.get(tower.component)) for tower in backbone.towers}
    )


def encoded(tower: TextTower, prompts: list[str], vectors: Tensor | None) -> TowerOutput:
    """Encode prompts; the first `rows` of them get embeddings `(rows, k, dim)` before their words."""
    count, parts = 0 if vectors is None else len(vectors), []
    if vectors is not None:
        tokens, place = prefixed(tower, prompts[:count], vectors.shape[1])
        with injected(tower, place, vectors):
            parts.append(tower.encode(tokens))
    if count < len(prompts):
        parts.append(tower.encode(tower.tokenize(prompts[count:])))
    return TowerOutput.cat(parts)
