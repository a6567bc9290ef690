"""Concept Ablation: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.concept import Concept
from erasure.needs import Need
from erasure.options import Presets
from erasure.strategies.base import register
from erasure.strategies.denoising import DenoiserStrategy
from erasure.strategies.prompts import anchor_scenes, anchored
from erasure.training.states import Mode, Scene, States

RELEASED: dict[str, object] = {
    "method": "x-strict", "rank": 0, "steps": 100, "batch": 8, "lr": 1.6e-5, "weight_decay": 1e-2, "warmup": 0,
    "clip": 1.0, "ema": 0.0, "states": "images", "rollouts": 1, "contexts": 195, "templates": True,
    "rollout_steps": 25, "rollout_guidance": 6.0, "trained_guidance": (), "retain_batch": 0,
    "retain_form": "anchors", "retain_target": "noise", "retain_weight": 1.0, "scope_weight": 0.0,
}  # fmt: skip
"""Options of the commands in the authors' README for styles and objects, which run on two GPUs."""


@register("concept_ablation")
@dataclass(frozen=True, kw_only=True)
class ConceptAblation(DenoiserStrategy):
    """Train the denoiser to predict, for prompts with the concept, what it predicts for those with the anchor.

    On images that the stock model draws for prompts a with the anchor, noised to x_t, with the frozen model e:

        |e_student(x_t, c) - e(x_t, a)|^2 + retain_weight |e_student(x'_t, r) - target|^2

    c is the same prompt with the concept in the anchor's place. By default the retained prompts r are prompts that
    must survive, with the stock model's prediction as target; in the paper they are the anchor's prompts, with the
    noise in x'_t as target (`retain_form="anchors"`, `retain_target="noise"`). Every concept needs an anchor; where
    the anchor is erased as well, the anchor's own anchor is used. By default a LoRA is trained on the attention layers
    that process text.

    Presets train the keys and values of the cross-attention in full. `paper` draws 1000 images; `released` draws 200,
    the default of the authors' script; `released-prior` is its `--with_prior_preservation`, which doubles the learning
    rate. The authors take captions that name the anchor from LAION (by a search service that no longer exists) and
    from GPT-3.5; here the phrasings of the anchor and random prompts with it are used, 200 in all. Left out are flips
    and zooms of the images ("a far away ...") with their masks, DPM-Solver as the sampler (DDIM with as many steps is
    used), the exclusion of the start token's keys and values from gradients, and a teacher that changes during
    training (in the authors' code the teacher is the student itself).

    Protects released weights. Prompts that describe the concept without its names are not trained on.
    """

    title: ClassVar[str] = "fine-tuning of the denoiser to draw the anchor"
    paper: ClassVar[str] = "Concept Ablation, Kumari et al. 2023, arXiv 2303.13516"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 5 denoiser passes a training state"
    asks_null: ClassVar[bool] = False

    states: Mode = "images"
    """Where training states come from. `images`: images of the anchor are drawn once, and noised anew for every
    state (paper). `buffer`: states of the anchor's trajectories, whose predictions are known already. `online`: a
    new trajectory for every state."""
    retain_form: Literal["phrasings", "anchors"] = "phrasings"
    """Prompts that must survive. `phrasings`: the phrasings of the retain lists, the empty prompt and
    `retain_vocabulary` random prompts. `anchors`: the prompts with the anchors, whose images are drawn anyway
    (paper)."""
    retain_target: Literal["teacher", "noise"] = "teacher"
    """Target of the student on prompts that must survive: the stock model's prediction, or the noise in the image
    (paper)."""

    presets: ClassVar[Presets] = {
        "paper": {**RELEASED, "rollouts": 5},
        "released": RELEASED,
        "released-prior": {**RELEASED, "lr": 3.2e-5, "retain_batch": 8},
    }

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.retain_target == "noise" and self.states != "images":
            self.refuse("retain_target", "noise", "'teacher' unless 'states' is 'images', whose noise is known")

    def ignores_retain(self) -> str:
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return super().ignores_retain() or ("retain_form" if self.retain_form == "anchors" else "")

    def scales(self, backbone: Backbone) -> tuple[float, ...]:
        """See `TrainedStrategy.scales`; a target of noise allows only 1, because guidance does not scale noise."""
        scales = super().scales(backbone)
        if self.retain_batch and self.retain_target == "noise" and any(scale != 1 for scale in scales):
            self.refuse(
                "retain_target", "noise",
                f"'teacher' for a model that is told guidance of {scales}, unless 'trained_guidance' is (1.0,)",
            )  # fmt: skip
        return scales

    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give prompts with the anchors to draw, and the prompts with the concepts that are trained on their states.

        Raises:
            ConceptError: A concept has no anchor.
        """
        named = self.phrased(anchored(tower, concepts, self.name))
        return anchor_scenes(tower, named, seed, self.contexts, scope=bool(self.scope_weight))

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give the prompts that must survive, see `TrainedStrategy.retained_scenes`."""
        if self.retain_form == "anchors":
            return [Scene(prompt) for prompt in dict.fromkeys(s.prompt for s in self.scenes(tower, concepts, seed))]
        return super().retained_scenes(tower, concepts, seed)

    def target(self, states: States) -> Tensor:
        """Give the stock model's prediction for the prompt with the anchor."""
        return states.own

    def retained_target(self, states: States) -> Tensor:
        """Give the target for prompts that must survive, as the option `retain_target` says."""
        return states.noised if self.retain_target == "noise" else states.own
