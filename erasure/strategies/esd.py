"""ESD: Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023, arXiv 2303.07345)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits
from erasure.interop import paths
from erasure.options import Presets
from erasure.strategies.base import register
from erasure.strategies.trained import Batch, Task, TrainedStrategy
from erasure.training.student import Student, make_student

Method = Literal["x", "x-strict", "u", "self", "all"]

RELEASED: dict[str, object] = {
    "method": "x", "rank": 0, "base": "null", "eta": 1.0, "steps": 200, "lr": 5e-5, "batch": 1, "retain_batch": 0,
    "contexts": 0, "states": "online", "rollouts": 1000, "rollout_steps": 50, "clip": 0.0,
}  # fmt: skip
"""What the released scripts have in common, in the paper's eta."""


@register("esd")
@dataclass(frozen=True, kw_only=True)
class ESD(TrainedStrategy):
    """Fine-tune the denoiser to predict, for prompts with the concept, what negative guidance would.

    On states x_t of trajectories towards the concept c, with the frozen model as teacher e:

        |e_student(x_t, c) - [e(x_t, b) - eta (e(x_t, c) - e(x_t, n))]|^2

    The paper's base b and contrast n are both the empty prompt. Here they are the same prompt with the concept's
    anchor, where it has one, so that the rest of the prompt (a style, a second object) stays; besides, the teacher's
    own predictions are matched on prompts that must survive. Trains a LoRA on the layers of `esd-x` by default.

    Protects released weights against prompts; learned embeddings, and attacks that optimise prompts, bring much of a
    concept back.
    """

    title: ClassVar[str] = "fine-tuning of the denoiser towards negative guidance"
    paper: ClassVar[str] = "Gandikota et al. 2023, arXiv 2303.07345"
    families: ClassVar[tuple[str, ...]] = ("stable-diffusion",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 5 denoiser passes a training state"

    method: Method = "x"
    """What is trained, as the released code names it: `x` the cross-attention, `x-strict` its keys and values, `self`
    the self-attention, `u` everything but the cross-attention, `all` everything."""

    presets: ClassVar[Presets] = {
        # CompVis code: eta 1, Adam 1e-5, 1000 updates of one state, which the student has come to.
        "paper": {**RELEASED, "steps": 1000, "lr": 1e-5, "rollout_by": "student"},
        # esd_sd.py of 2025 starts from the concept's own prediction, so its eta of 2 is the paper's 1.
        "released-x": RELEASED,
        "released-x-strict": {**RELEASED, "method": "x-strict"},
        "released-u": {**RELEASED, "method": "u"},
        "released-all": {**RELEASED, "method": "all"},
        # Its --erase_from starts from that prompt, with the same eta of 2.
        "released-from": {**RELEASED, "base": "anchor", "against": "null", "eta": 2.0},
        # esd_sdxl.py: an eta of 1 from the concept's own prediction is a match of the empty prompt.
        "released-sdxl": {**RELEASED, "eta": 0.0, "lr": 2e-4, "rollout_guidance": 2.0},
    }

    def student(self, backbone: Backbone, tower: TextTower, generator: torch.Generator) -> Student:
        """A LoRA on the chosen layers, or their parameters themselves."""
        paths = trained_parameters(backbone, self.method)
        return make_student(backbone.denoiser, paths, self.rank, generator, f"method {self.method!r}")

    def predict(self, task: Task, batch: Batch) -> Tensor:
        """One pass for all rows, with the stock encodings."""
        return task.backbone.predict(batch.x, batch.t, task.prompts(batch.prompts))

    def edits(self, task: Task) -> Edits:
        """Of the denoiser."""
        component = task.backbone.denoiser_component
        low_rank = {f"{component}/{path}": pair for path, pair in task.student.low_rank().items()}
        return Edits(low_rank, {f"{component}/{path}": delta for path, delta in task.student.deltas().items()})

    def idle(self, backbone: Backbone) -> list[nn.Module]:
        """The text encoders, whose encodings are cached, and the autoencoder."""
        return [*(tower.module for tower in backbone.towers), backbone.pipe.vae]


def trained_parameters(backbone: Backbone, method: Method) -> list[str]:
    """Paths of the denoiser's parameters that a method of ESD trains."""
    sites = backbone.attention_sites()
    cross = tuple(f"{site.name}." for site in sites if site.kind != "self")
    own = tuple(f"{site.name}." for site in sites if site.kind == "self")
    every = list(paths.canonical_parameters(backbone.denoiser))
    if method == "x":
        return [path for path in every if path.startswith(cross)]
    if method == "x-strict":
        entry = tuple(f"{layer.key.split('/', 1)[1]}." for layer in backbone.entry_layers())
        return [path for path in every if path.startswith(entry)]
    if method == "self":
        return [path for path in every if path.startswith(own)]
    return [path for path in every if method == "all" or not path.startswith(cross)]
