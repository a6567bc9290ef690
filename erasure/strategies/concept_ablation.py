"""Concept Ablation: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
"""The commands of the authors' README for styles and objects, on its two GPUs."""


@register("concept_ablation")
@dataclass(frozen=True, kw_only=True)
class ConceptAblation(DenoiserStrategy):
    """Train the denoiser to predict, for prompts with the concept, what it predicts for those with the anchor.

    Of images z that the stock model draws for prompts a with the anchor, noised to x_t, with the frozen model e:

        |e_student(x_t, c) - e(x_t, a)|^2 + retain_weight |e_student(x'_t, r) - target|^2

    c is the same prompt with the concept in the anchor's place. The paper's prior r are the anchor's prompts
    themselves, with the noise in x'_t as target (`retain_form="anchors"`, `retain_target="noise"`); here they are
    prompts that must survive, with the stock model's prediction as target. Every concept needs an anchor; of one that
    is erased as well, its own takes the place. Trains a LoRA on the attention that text passes by default.

    Presets train the keys and values of the cross-attention in full. `paper` draws 1000 images, `released` 200, as the
    default of the authors' script is; `released-prior` is its `--with_prior_preservation`, which doubles the learning
    rate. Captions of LAION (a search service that is gone) and of GPT-3.5 name the anchor there: in their place stand
    the phrasings of a concept and 195 random prompts with it, 200 in all. Left out are flips and zooms of the images
    ("a far away ...") with their masks, DPM-Solver as the sampler (DDIM here, as many steps), gradients that pass by
    the keys and values of the start token, and a teacher that learns along: there it is the student itself.

    Protects released weights. Prompts that say the concept in other words than its names are not trained on.
    """

    title: ClassVar[str] = "fine-tuning of the denoiser to draw the anchor"
    paper: ClassVar[str] = "Concept Ablation, Kumari et al. 2023, arXiv 2303.13516"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 5 denoiser passes a training state"
    asks_null: ClassVar[bool] = False

    states: Mode = "images"
    """`images` draws images of the anchor to the end once, and noises them anew for every state (paper); `buffer`
    takes the states of their trajectories, whose predictions are there already; `online` rolls every state anew."""
    retain_form: Literal["phrasings", "anchors"] = "phrasings"
    """Prompts that must survive: the retain lists' phrasings, the empty prompt and `retain_vocabulary` random prompts;
    or those with the anchors, whose images are drawn anyway (paper)."""
    retain_target: Literal["teacher", "noise"] = "teacher"
    """What the student must predict for them: what the stock model does, or the noise that is in the image (paper)."""

    presets: ClassVar[Presets] = {
        "paper": {**RELEASED, "rollouts": 5},
        "released": RELEASED,
        "released-prior": {**RELEASED, "lr": 3.2e-5, "retain_batch": 8},
    }

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow."""
        super().__post_init__()
        if self.retain_target == "noise" and self.states != "images":
            self.refuse("retain_target", "noise", "'teacher' unless 'states' is 'images', whose noise is known")

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return super().ignores_retain() or ("retain_form" if self.retain_form == "anchors" else "")

    def scales(self, backbone: Backbone) -> tuple[float, ...]:
        """See `TrainedStrategy.scales`; the noise in an image is what is predicted without guidance alone."""
        scales = super().scales(backbone)
        if self.retain_batch and self.retain_target == "noise" and any(scale != 1 for scale in scales):
            self.refuse(
                "retain_target", "noise",
                f"'teacher' for a model that is told guidance of {scales}, unless 'trained_guidance' is (1.0,)",
            )  # fmt: skip
        return scales

    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Prompts with the anchors to draw, and those with the concepts to learn there.

        Raises:
            ConceptError: A concept has no anchor.
        """
        named = anchored(tower, concepts, self.name)
        if not self.templates:
            named = [replace(concept, templates=("{}",)) for concept in named]
        return anchor_scenes(tower, named, seed, self.contexts, scope=bool(self.scope_weight))

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """See `TrainedStrategy.retained_scenes`."""
        if self.retain_form == "anchors":
            return [Scene(prompt) for prompt in dict.fromkeys(s.prompt for s in self.scenes(tower, concepts, seed))]
        return super().retained_scenes(tower, concepts, seed)

    def target(self, states: States) -> Tensor:
        """The stock model's prediction for the prompt with the anchor."""
        return states.own

    def retained_target(self, states: States) -> Tensor:
        """See `retain_target`."""
        return states.noised if self.retain_target == "noise" else states.own
