"""ESD: Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023, arXiv 2303.07345)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from erasure.backbones import TextTower
from erasure.concept import Concept
from erasure.needs import Need
from erasure.options import Presets
from erasure.strategies.base import register
from erasure.strategies.denoising import DenoiserStrategy
from erasure.strategies.negative_guidance import NegativeGuidance
from erasure.text.words import aligned_prompts
from erasure.training.states import Scene, States

RELEASED: dict[str, object] = {
    "method": "x", "rank": 0, "base": "null", "eta": 1.0, "steps": 200, "lr": 5e-5, "batch": 1, "retain_batch": 0,
    "templates": False, "contexts": 0, "states": "online", "rollouts": 1000, "rollout_steps": 50,
    "rollout_guidance": 3.0, "clip": 0.0,
}  # fmt: skip
"""Options that all released scripts have in common, with eta in the paper's convention."""


@register("esd")
@dataclass(frozen=True, kw_only=True)
class ESD(DenoiserStrategy, NegativeGuidance):
    """Fine-tune the denoiser to predict, for prompts with the concept, what negative guidance would.

    On states x_t of trajectories of the concept's prompt c, with the frozen model as teacher e:

        |e_student(x_t, c) - [e(x_t, b) - eta (e(x_t, c) - e(x_t, n))]|^2

    In the paper the base b and the contrast n are both the empty prompt. By default they are the same prompt with the
    concept's anchor, where it has one, so that the rest of the prompt (a style, a second object) stays. The teacher's
    predictions are also matched on prompts that must survive. By default a LoRA is trained on the layers of `esd-x`.

    Presets train on the bare name and retain nothing. `paper` is the CompVis code: eta 1, Adam at 1e-5, 1000 updates
    of one state on the student's own trajectory. That code evaluates the denoiser at a timestep that is on average 47
    of 1000 above the state's own, because its sampler goes two steps too far; here each state is evaluated at its own
    timestep. `released-...` is esd_sd.py of 2025, where the teacher samples the trajectories, and `released-from` is
    its `--erase_from`, where the anchor's prompt is sampled and trained. Its weights in bfloat16 and its size of 1024
    pixels for a model of 512 are left out. States come from DDIM, where the script uses the pipeline's own scheduler.

    Protects released weights against prompts. Learned embeddings, and attacks that optimise prompts, bring much of a
    concept back.
    """

    title: ClassVar[str] = "fine-tuning of the denoiser towards negative guidance"
    paper: ClassVar[str] = "Gandikota et al. 2023, arXiv 2303.07345"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 5 denoiser passes a training state"

    trained_prompt: Literal["concept", "anchor"] = "concept"
    """Prompt that is sampled and trained: with the concept, or with the anchor in its place. With `anchor`, the
    concept ("cowboy hat") is erased from what the anchor ("cowboy") means, and the target starts from the anchor's
    prediction: `e(x_t, a) - eta (e(x_t, c) - e(x_t, n))`."""

    presets: ClassVar[Presets] = {
        "paper": {**RELEASED, "steps": 1000, "lr": 1e-5, "rollout_by": "student"},
        # esd_sd.py of 2025 starts from the concept's own prediction, so its eta of 2 is the paper's 1.
        "released-x": RELEASED,
        "released-x-strict": {**RELEASED, "method": "x-strict"},
        "released-u": {**RELEASED, "method": "u"},
        "released-all": {**RELEASED, "method": "all"},
        "released-from": {**RELEASED, "trained_prompt": "anchor", "base": "anchor", "against": "null", "eta": 2.0},
        # The script for FLUX.1: predictions without guidance, rollouts with it, and a match of the empty prompt.
        "released-flux": {
            **RELEASED,
            "eta": 0.0,
            "steps": 1400,
            "lr": 1e-4,
            "rollout_steps": 28,
            "rollout_guidance": 3.5,
            "trained_guidance": (1.0,),
            "resolution": 512,
        },
        # esd_sdxl.py: an eta of 1 from the concept's own prediction is a match of the empty prompt.
        "released-sdxl": {**RELEASED, "eta": 0.0, "lr": 2e-4, "rollout_guidance": 2.0},
    }

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.trained_prompt == "anchor" and (self.scope_weight or self.contexts):
            self.refuse("trained_prompt", "anchor", "'concept', unless 'scope_weight' and 'contexts' are 0")

    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give the prompts to sample, see `TrainedStrategy.scenes`; those with the anchors when these are trained."""
        if self.trained_prompt == "concept":
            return super().scenes(tower, concepts, seed)
        for concept in concepts:
            if not concept.anchor:
                self.refuse("trained_prompt", "anchor", f"'concept' for {concept.target!r}, which has no anchor")
        pairs = [pair for concept in self.phrased(concepts) for pair in aligned_prompts(tower, concept)]
        return list(dict.fromkeys(Scene(pair.anchor_prompt, (pair.prompt,)) for pair in pairs))

    def target(self, states: States) -> Tensor:
        """Compute the target for the concept's prompts, see `TrainedStrategy.target`."""
        if self.trained_prompt == "concept":
            return super().target(states)
        return self.pushed(states, states.own if self.base == "anchor" else states.unprompted, states.asked[:, 0])
