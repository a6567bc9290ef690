"""SAFREE: a filter of prompts at inference (Yoon et al., ICLR 2025, 2410.12761).

The artifact holds, for each text encoder whose states the denoiser reads, the subspace of the concept's names, and the
figures of the rules. In use, a hook on the text encoder finds the tokens of a prompt that bring it near the concept
(`erasure.carriers.readings`), and a hook on the denoiser projects their states away from it in the first steps
(`erasure.carriers.filters` has the formulas) and holds low frequencies of a UNet's features below those that the
prompt as it is would give (`erasure.carriers.skips`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits
from erasure.carriers.filters import PromptFilter, span
from erasure.carriers.readings import ALL, REST, pooled_vectors
from erasure.carriers.safety import OF_STEPS
from erasure.concept import Concept
from erasure.errors import DivergenceError, IgnoredRetainWarning, UnsupportedModelError
from erasure.interop import paths
from erasure.needs import Need
from erasure.options import NotNegative, Presets, ZeroToOne
from erasure.strategies.base import Fit, Strategy, register

MASK = 0
"""Token that masks another: CLIP's `!`, T5's padding."""
ALWAYS = -1000.0
"""Midpoint at which every step is filtered, whatever the prompt."""
NUDITY = {
    "alpha": 0.01,
    "most_steps": 10,
    "sharpness": 5.0,
    "midpoint": 5.333,
    "phrasings": False,
    "against": "others",
    "carried": False,
}
"""Figures of the released code; its sharpness is 2 times 2.5."""


@register("safree")
@dataclass(frozen=True, kw_only=True)
class SAFREE(Strategy):
    """Project the words that bring a prompt near the concept out of the concept's subspace while it is drawn.

    A word is a trigger where the prompt without it is farther from the concept than without another word, by a share
    alpha. States of triggers are projected into the prompt's own subspace less the concept's. How many of the first
    steps read them follows from how far the projection moves the prompt as a whole; the others read the prompt as it
    is. With re-attention, the prompt is drawn beside as it is, and where low frequencies of the decoder's features are
    stronger with projected words than without, they are attenuated. Nothing is trained, and nothing of the model
    changes; the names of all concepts span one subspace.

    The rule compares a prompt's words with one another, so prompts without the concept have triggers too. Each prompt
    of a batch has its own; negative prompts stay. A prompt is encoded once more for each of its words, and a filtered
    step with re-attention takes one row more for each picture. Transformers have no features that an encoder hands to
    a decoder: they are filtered in their words alone, as the released code does it for SD3 and SDXL (there in every
    step, and of SDXL's encoders in the second alone). Pooled vectors stay, as they do there.

    Where the paper and its code differ, this follows the paper: triggers are attenuated, not set to the factor itself,
    and re-attention acts; in the code it is switched on and does nothing (its mode is never set). The scripts also
    give the concept's names as the negative prompt, which is the caller's to do here.

    Protects a hosted pipeline: whoever holds the weights leaves the hooks out, and embeddings that no text encoder of
    the pipeline gave (`prompt_embeds=`) bypass it.
    """

    title: ClassVar[str] = "projection of a prompt's words away from the concept at inference"
    paper: ClassVar[str] = "Yoon et al. 2024, arXiv 2410.12761"
    needs: ClassVar[tuple[Need, ...]] = ("word states",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "under a second; filtered steps take up to 1.5 times as long"
    carriers: ClassVar[tuple[str, ...]] = ("activations",)

    alpha: Annotated[float, Ge(-1), Le(10)] = 0.1
    """How much farther from the concept a prompt must be without a word for it to be a trigger, as a share."""
    against: Literal["prompt", "others"] = "prompt"
    """Compare the prompt without a word with the prompt as it is, or with those without another word (paper)."""
    carried: bool = True
    """Project what may carry a trigger's meaning too: the tokens behind it, which have seen it, end token and padding
    among them; of T5 the whole prompt. Otherwise triggers alone (paper)."""
    most_steps: Annotated[int, Ge(0), Le(OF_STEPS)] = OF_STEPS
    """At most so many of 50 steps are filtered behind the first one, gamma."""
    sharpness: NotNegative = 5.0
    """How suddenly the number of filtered steps grows with the distance of the projected prompt."""
    midpoint: Annotated[float, Ge(-1000), Le(1000)] = 5.333
    """Ten times the distance, 1 - cosine, at which half of `most_steps` are filtered."""
    validated: bool = False
    """Let the distance decide how many steps are filtered; otherwise `most_steps` are."""
    reattention: bool | None = None
    """Attenuate features of a UNet's decoder. Left out: where there is one."""
    widest: ZeroToOne = 0.9
    """Factor where the decoder's features have the most channels, s_1."""
    second: ZeroToOne = 0.2
    """Factor where they have the second most, s_2."""
    phrasings: bool = True
    """Let every phrasing of the concept span its subspace, not its names alone."""

    presets: ClassVar[Presets] = {
        "paper": {**NUDITY, "validated": True, "reattention": None, "widest": 0.9, "second": 0.2},
        "released": {**NUDITY, "validated": True, "reattention": False},
        "released-artist": {**NUDITY, "sharpness": 7.0, "midpoint": 5.5, "validated": True, "reattention": False},
        "released-every-step": {**NUDITY, "most_steps": OF_STEPS, "validated": False, "reattention": False},
    }

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Find the subspace of the concepts' names in each text encoder that the denoiser reads word by word."""
        if any(concept.retain for concept in concepts):
            warnings.warn(
                "safree keeps nothing on purpose, so what is to survive has no effect: take it off the retain list, "
                "or use a method that fits a model to it (uce, itd, esd)",
                IgnoredRetainWarning,
                stacklevel=4,
            )
        decodes = bool(paths.decoder_parts(backbone.denoiser))
        if self.reattention and not decodes:
            raise UnsupportedModelError(
                f"safree cannot attenuate features of a {type(backbone.denoiser).__name__}: a transformer hands none "
                "from an encoder to a decoder. Leave reattention out: its prompts are filtered all the same"
            )
        factors = [self.widest, self.second] if decodes and self.reattention is not False else []
        edits = Edits()
        for part in backbone.written():
            tower = backbone.tower(part.component)
            first, last, column = part.places.start or 0, part.places.stop, part.columns.start
            edits.filters[f"{backbone.denoiser_component}/{part.component}"] = PromptFilter(
                self.subspace(tower, concepts),
                torch.tensor([self.alpha, self.most_steps, self.sharpness, self.middle]).double(),
                torch.tensor(factors).float(),
                torch.tensor([first, 0 if last is None else last - first, column]),
                torch.tensor([tower.leading, tower.end, MASK]),
                torch.tensor([int(self.against == "prompt"), self.carried and (REST if tower.causal else ALL)]),
            )
        progress(1.0)
        return Fit(edits, {})

    @property
    def middle(self) -> float:
        """The midpoint in force."""
        return self.midpoint if self.validated else ALWAYS

    def subspace(self, tower: TextTower, concepts: Sequence[Concept]) -> torch.Tensor:
        """Orthonormal rows `(rank, dim)` that span the pooled vectors of the concepts' names."""
        texts: list[str] = []
        for concept in concepts:
            for name in concept.names:
                tower.check_words(name)
            texts += concept.prompts() if self.phrasings else concept.names
        tokens = tower.tokenize(list(dict.fromkeys(texts)))
        with torch.no_grad():
            found = pooled_vectors(tower.module, tokens.ids, tokens.attention_mask).float()
        if not found.isfinite().all():
            raise DivergenceError(
                f"the {tower.component} gives NaN or infinity for {texts[0]!r}: its weights are damaged, or its "
                "precision is too low; load the model again"
            )
        return span(found).float().cpu()
