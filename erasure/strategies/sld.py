"""SLD: Safe Latent Diffusion, guidance away from a concept at inference (Schramowski et al., CVPR 2023, 2211.05105).

The artifact contains the encodings of the concept and of the empty prompt by the stock text encoders, and the
parameters of the guidance; it is stamped with fingerprints of the text encoders and of the denoiser's layers that read
text. When attached, a hook on the denoiser adds rows with the concept's encoding to every call and removes their
predictions again (`erasure.carriers.extra_rows`). It subtracts the safety correction from the predictions for the
prompts (`erasure.carriers.safety`), so that the usual guidance of a stock pipeline gives the paper's formula at every
guidance scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Lt

from erasure.backbones import Backbone
from erasure.carriers.edits import Edits
from erasure.carriers.safety import OF_STEPS, SafetyGuidance
from erasure.concept import Concept
from erasure.needs import Need
from erasure.options import NotNegative, Positive, Presets, ZeroToOne
from erasure.strategies.base import Fit, Strategy, register, warn_that_nothing_is_retained

SHOWN = "an image showing {}"
"""Prompt template of the released code for concepts."""


@register("sld")
@dataclass(frozen=True, kw_only=True)
class SLD(Strategy):
    """Guide every denoising step away from the prediction for the concept's own prompt.

    In addition to the prompt and the negative prompt, the denoiser predicts for the concept's words. Wherever the
    prompt's prediction does not exceed the concept's by a threshold, the difference of the concept's and the negative
    prompt's prediction is subtracted from the guidance. The difference is multiplied by a factor up to 1 that grows
    with the distance between the prompt's and the concept's predictions, and momentum is carried from step to step
    (`erasure.carriers.safety` has the formulas). Nothing is trained and no weight changes. Images of prompts without
    the concept change too. The names of all concepts form one text, as in the paper.

    A call takes one more row for each image and erasure (1.5 times the cost of a guided call), or two more without
    guidance and in guidance-distilled models. Where a pipeline guides in two passes (Flux with a true negative prompt,
    Chroma), the empty prompt is used instead of the negative prompt.

    The warm-up is given for a schedule of 50 steps, and scaled to other schedules: half as many steps of 25.
    `threshold` and `scale` are in units of the denoiser's prediction; the paper's values are for Stable Diffusion's
    predicted noise. Protects a hosted pipeline: whoever has the weights can leave the hook out. Calls with embeddings
    instead of a prompt, with image prompts or with ControlNets are guided too.
    """

    title: ClassVar[str] = "guidance away from the concept at inference"
    paper: ClassVar[str] = "Schramowski et al. 2023, arXiv 2211.05105"
    needs: ClassVar[tuple[Need, ...]] = ("entry layers",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "under a second; calls take up to 1.5 times as long"
    carriers: ClassVar[tuple[str, ...]] = ("guidance",)

    scale: Positive = 5000.0
    """Factor s_S of the distance from the concept; where s_S times the distance exceeds 1, the whole difference is
    subtracted."""
    threshold: Annotated[float, Ge(-1000), Lt(1000)] = 0.3
    """Threshold lambda: nothing is subtracted where the prompt's prediction exceeds the concept's by lambda or more
    (preset `max`: 1)."""
    momentum_scale: NotNegative = 0.5
    """Scale s_m at which the momentum is added."""
    momentum_decay: ZeroToOne = 0.7
    """Decay beta_m: share of the momentum that is kept from step to step."""
    warmup_steps: Annotated[int, Ge(0), Lt(OF_STEPS)] = 0
    """Number delta of steps, for a schedule of 50, before guidance begins; momentum is accumulated meanwhile."""
    text: str = "{}"
    """Prompt template for the concept; the braces are replaced by its names, separated by commas."""

    presets: ClassVar[Presets] = {
        "weak": {
            "scale": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum_decay": 0.0, "warmup_steps": 15,
            "text": SHOWN,
        },
        "medium": {
            "scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum_decay": 0.4, "warmup_steps": 10,
            "text": SHOWN,
        },
        "strong": {
            "scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum_decay": 0.7, "warmup_steps": 7,
            "text": SHOWN,
        },
        "max": {
            "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum_decay": 0.7, "warmup_steps": 0,
            "text": SHOWN,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.text.count("{}") != 1 or set(self.text.replace("{}", "")) & set("{}"):
            self.refuse("text", self.text, "a text with {} once, where the concept's names go")

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Encode the concepts and the empty prompt."""
        warn_that_nothing_is_retained(self.name, concepts)
        names = list(dict.fromkeys(words for concept in concepts for words in concept.names))
        for tower in backbone.towers:
            for words in names:
                tower.check_words(words)
        with torch.no_grad():
            own = backbone.encode([self.text.format(", ".join(names))])
            null = backbone.null(backbone.encode([""]))
        encodings = own.cat([own, null])
        mask = torch.ones(encodings.tokens.shape[:2]) if encodings.mask is None else encodings.mask
        pooled = [] if encodings.pooled is None else [encodings.pooled.cpu()]
        figures = torch.tensor([self.scale, self.threshold, self.momentum_scale, self.momentum_decay])
        guidance = SafetyGuidance(
            encodings.tokens.cpu(), mask.long().cpu(), figures.double(), torch.tensor(self.warmup_steps), *pooled
        )
        progress(1.0)
        return Fit(Edits(safety={backbone.denoiser_component: guidance}), {})
