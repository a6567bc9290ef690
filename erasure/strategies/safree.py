"""SAFREE: a filter of prompts at inference (Yoon et al., ICLR 2025, 2410.12761).

The artifact contains, for each text encoder whose token states the denoiser reads, the subspace of the concept's names
and the parameters of the method. When attached, a hook on the text encoder finds the tokens of a prompt that bring it
near the concept (`erasure.carriers.readings`). A hook on the denoiser projects the states of these tokens away from
the concept in the first steps (`erasure.carriers.filters` has the formulas), and limits low frequencies of a UNet's
skip features to those of the unfiltered prompt (`erasure.carriers.skips`).
"""

from __future__ import annotations

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
from erasure.errors import UnsupportedModelError
from erasure.interop import paths
from erasure.needs import Need
from erasure.options import NotNegative, Presets, ZeroToOne
from erasure.strategies.base import Fit, Strategy, register, warn_that_nothing_is_retained
from erasure.text.encodings import require_finite

MASK = 0
"""Id of the token that replaces a masked word: `!` in CLIP, padding in T5."""
ALWAYS = -1000.0
"""Value of `midpoint` with which `most_steps` steps are filtered for every prompt."""
NUDITY = {
    "alpha": 0.01,
    "most_steps": 10,
    "sharpness": 5.0,
    "midpoint": 5.333,
    "phrasings": False,
    "against": "others",
    "carried": False,
}
"""Options of the released code for nudity; its sharpness is 2 times 2.5."""


@register("safree")
@dataclass(frozen=True, kw_only=True)
class SAFREE(Strategy):
    """Project the words that bring a prompt near the concept away from the concept's subspace during sampling.

    A word is a trigger if removing it moves the prompt away from the concept by a share alpha more than removing
    another word does. States of triggers are projected into the subspace of the prompt and away from that of the
    concept. The number of filtered steps, which are the first ones, follows from how far the projection moves the
    whole prompt; later steps read the prompt unchanged. With re-attention, the unfiltered prompt is predicted too, and
    low frequencies of the decoder's features that are stronger with filtered words are attenuated. Nothing is trained
    and no weight changes. The names of all concepts span one subspace.

    The rule compares the words of a prompt with one another, so prompts without the concept have triggers too. Each
    prompt of a batch has its own triggers; negative prompts are not filtered. A prompt is encoded once more for each
    of its words, and a filtered step with re-attention takes one more row for each image. Transformers have no skip
    features, so only their words are filtered, as in the released code for SD3 and SDXL (which filters every step, and
    only the second text encoder of SDXL). Pooled vectors are not filtered, as in that code.

    Where the paper and its code differ, the paper is followed: the low frequencies of triggers are multiplied by the
    factor, not set to it, and re-attention has an effect, which it lacks in the code because its mode is never set.
    The scripts also use the concept's names as the negative prompt, which is left to the caller here.

    Protects a hosted pipeline: whoever has the weights can leave the hooks out, and embeddings that no text encoder of
    the pipeline gave (`prompt_embeds=`) bypass the erasure.
    """

    title: ClassVar[str] = "projection of a prompt's words away from the concept at inference"
    paper: ClassVar[str] = "Yoon et al. 2024, arXiv 2410.12761"
    needs: ClassVar[tuple[Need, ...]] = ("word states",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "under a second; calls take up to 1.3 times as long"
    carriers: ClassVar[tuple[str, ...]] = ("activations",)

    alpha: Annotated[float, Ge(-1), Le(10)] = 0.1
    """Relative increase of the prompt's distance from the concept, when a word is removed, above which the word is
    a trigger (paper: 0.01)."""
    against: Literal["prompt", "others"] = "prompt"
    """What the prompt without a word is compared with: the whole prompt, or the mean of the prompts without another
    word (paper)."""
    carried: bool = True
    """Also project tokens that can carry a trigger's meaning: all tokens after it, with the end token and padding;
    in T5 the whole prompt. When off, only triggers are projected (paper)."""
    most_steps: Annotated[int, Ge(0), Le(OF_STEPS)] = OF_STEPS
    """Largest number gamma of filtered steps after the first one, for a schedule of 50 steps (paper: 10)."""
    sharpness: NotNegative = 5.0
    """Steepness of the sigmoid that gives the number of filtered steps from the distance of the projected prompt
    (paper: 5)."""
    midpoint: Annotated[float, Ge(-1000), Le(1000)] = 5.333
    """Ten times the distance (1 - cosine) of the projected prompt at which half of `most_steps` are filtered."""
    validated: bool = False
    """Compute the number of filtered steps from the distance of the projected prompt; when off, `most_steps` are
    filtered."""
    reattention: bool | None = None
    """Attenuate features of a UNet's decoder (re-attention). When left out: on for models with a UNet."""
    widest: ZeroToOne = 0.9
    """Factor s_1 of attenuated features with the largest number of channels (paper: 0.9)."""
    second: ZeroToOne = 0.2
    """Factor s_2 of attenuated features with the second largest number of channels (paper: 0.2)."""
    phrasings: bool = True
    """Span the concept's subspace by all of its phrasings; when off, by its names alone."""

    presets: ClassVar[Presets] = {
        "paper": {**NUDITY, "validated": True, "reattention": None, "widest": 0.9, "second": 0.2},
        "released": {**NUDITY, "validated": True, "reattention": False},
        "released-artist": {**NUDITY, "sharpness": 7.0, "midpoint": 5.5, "validated": True, "reattention": False},
        "released-every-step": {**NUDITY, "most_steps": OF_STEPS, "validated": False, "reattention": False},
    }

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Find the subspace of the concepts' names in each text encoder whose token states the denoiser reads."""
        warn_that_nothing_is_retained(self.name, concepts)
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
        """Midpoint that is saved, which depends on `validated`."""
        return self.midpoint if self.validated else ALWAYS

    def subspace(self, tower: TextTower, concepts: Sequence[Concept]) -> torch.Tensor:
        """Compute orthonormal rows `(rank, dim)` that span the pooled vectors of the concepts' names."""
        texts: list[str] = []
        for concept in concepts:
            for name in concept.names:
                tower.check_words(name)
            texts += concept.prompts() if self.phrasings else concept.names
        tokens = tower.tokenize(list(dict.fromkeys(texts)))
        with torch.no_grad():
            found = pooled_vectors(tower.module, tokens.ids, tokens.attention_mask).float()
        require_finite(tower, found, f"for {texts[0]!r}")
        return span(found).float().cpu()
