"""SLD: Safe Latent Diffusion, guidance away from a concept at inference (Schramowski et al., CVPR 2023, 2211.05105).

The artifact holds what the text encoders, without any erasure, say of the concept and of the empty prompt, and the
figures of the guidance; it is stamped with fingerprints of the text encoders and of the denoiser's layers that read
text. In use, a hook on the denoiser puts rows with the concept's encoding behind those of every call and takes their
predictions off again (`erasure.carriers.extra_rows`); the prompts' own predictions leave it with the correction
subtracted (`erasure.carriers.safety`), so that the plain guidance of any stock pipeline computes the paper's formula,
whatever its scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Lt

from erasure.backbones import Backbone
from erasure.carriers.edits import Edits
from erasure.carriers.safety import OF_STEPS, SafetyGuidance
from erasure.concept import Concept
from erasure.errors import IgnoredRetainWarning
from erasure.needs import Need
from erasure.options import NotNegative, Positive, Presets, ZeroToOne
from erasure.strategies.base import Fit, Strategy, register

SHOWN = "an image showing {}"
"""What the released code tells concepts by."""


@register("sld")
@dataclass(frozen=True, kw_only=True)
class SLD(Strategy):
    """Steer every step of a drawing away from what the concept's own prompt would draw there.

    Beside the prompt and the negative one, the denoiser predicts for the concept's words. Where the prompt's
    prediction does not exceed the concept's by a threshold, the difference of the concept and the negative prompt is
    subtracted from the guidance, times a factor that grows with the distance of both up to 1, and with momentum from
    step to step (`erasure.carriers.safety` has the formulas). Nothing is trained, and nothing of the model changes: a
    prompt without the concept is drawn otherwise too. The names of all concepts are one text, as in the paper.

    A call costs one row more for each picture and erasure (1.5 times that of a guided call); without guidance, or with
    guidance that the denoiser is told, two more. Where pipelines guide in two passes (Flux with a true negative
    prompt, Chroma), the concept is compared with the empty prompt instead of the negative one.

    Warm-up counts noise levels of the schedule in use, of which a drawing of 25 steps has half as many as one of 50.
    A threshold or a scale is in units of the denoiser's prediction: the paper's are for Stable Diffusion's noise.
    Protects a hosted pipeline: whoever holds the weights leaves the hook out. Embeddings in the place of a prompt,
    pictures and ControlNets do not go around it.
    """

    title: ClassVar[str] = "guidance away from the concept at inference"
    paper: ClassVar[str] = "Schramowski et al. 2023, arXiv 2211.05105"
    needs: ClassVar[tuple[Need, ...]] = ("entry layers",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "under a second; calls take up to 1.5 times as long"
    carriers: ClassVar[tuple[str, ...]] = ("guidance",)

    scale: Positive = 5000.0
    """Factor of the distance from the concept, s_S: above 1 / distance all of the difference is subtracted."""
    threshold: Annotated[float, Ge(-1000), Lt(1000)] = 0.3
    """Lambda: where the prediction exceeds the concept's by this or more, nothing is subtracted (`max`: 1)."""
    momentum_scale: NotNegative = 0.5
    """How much of the momentum is added, s_m."""
    momentum_decay: ZeroToOne = 0.7
    """Share of the momentum that is kept from step to step, beta_m."""
    warmup_steps: Annotated[int, Ge(0), Lt(OF_STEPS)] = 0
    """Steps of 50 before guidance begins, delta; momentum builds up meanwhile."""
    text: str = "{}"
    """What the concept is told by: its names, commas between, stand in the place of the braces."""

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
        """Refuse values that an option does not allow."""
        super().__post_init__()
        if self.text.count("{}") != 1 or set(self.text.replace("{}", "")) & set("{}"):
            self.refuse("text", self.text, "a text with {} once, where the concept's names go")

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Encode the concepts and the empty prompt."""
        if any(concept.retain for concept in concepts):
            warnings.warn(
                "sld keeps nothing on purpose, so what is to survive has no effect: take it off the retain list, or "
                "use a method that fits a model to it (uce, itd, esd)",
                IgnoredRetainWarning,
                stacklevel=4,
            )
        names = list(dict.fromkeys(words for concept in concepts for words in concept.names))
        for tower in backbone.towers:
            for words in names:
                tower.check_words(words)
        with torch.no_grad():
            own = backbone.encode([self.text.format(", ".join(names))])
            null = backbone.null(backbone.encode([""]))
        told = own.cat([own, null])
        mask = torch.ones(told.tokens.shape[:2]) if told.mask is None else told.mask
        pooled = [] if told.pooled is None else [told.pooled.cpu()]
        figures = torch.tensor([self.scale, self.threshold, self.momentum_scale, self.momentum_decay])
        guidance = SafetyGuidance(
            told.tokens.cpu(), mask.long().cpu(), figures.double(), torch.tensor(self.warmup_steps), *pooled
        )
        progress(1.0)
        return Fit(Edits(safety={backbone.denoiser_component: guidance}), {})
