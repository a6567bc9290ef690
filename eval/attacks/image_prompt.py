"""Image prompts: a picture of the concept, told through an IP-Adapter beside the words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from erasure import assets
from erasure.backbones import Backbone
from erasure.eval.attacks import Access, ControlledAttack, register
from erasure.eval.attacks.changes import ImagePrompt
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.interop import image_prompts
from erasure.options import Count, PathText, Positive
from erasure.world import World


@register("image_prompt")
@dataclass(frozen=True, kw_only=True)
class PicturePrompt(ControlledAttack):
    """Tell the erased model a picture of the concept beside the sample's own prompt, through an IP-Adapter.

    The adapter was made for the original model; its keys and values of the picture stand beside those of the words in
    every cross-attention. The pass for guidance is told the picture of nothing, as diffusers does. Low scales are
    tried first, since they leave more to the words.

    The control tells a picture of the original model that does not show the concept.
    """

    title: ClassVar[str] = "a picture of the concept through an IP-Adapter"
    paper: ClassVar[str] = "IP-Adapter, Ye et al. 2023, arXiv 2308.06721; as a way around erasures, Li et al. 2025"
    access: ClassVar[Access] = "image"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "scales": (1.0,)},
        "quick": {"samples": 10},
        "full": {},
    }

    adapter: PathText = ""
    """File or folder of an IP-Adapter for the model; the one that it declares when left out (canvas-sd does)."""
    image_encoder: PathText = ""
    """Folder of the image encoder that the adapter was trained with; `image_encoder` beside its file when left out."""
    scales: tuple[Positive, ...] = (0.5, 1.0)
    """How much the picture counts beside the words, in the order in which they are tried (released code: 1)."""
    references: Count = 4
    """Seeds tried until the original model's picture shows the concept, or for the control does not."""

    @property
    def tries(self) -> int:
        """One for each scale."""
        return len(self.scales)

    def lacks(self, backbone: Backbone) -> str:
        """See `Attack.lacks`."""
        if lack := backbone.lacks("image prompts"):
            return lack
        if not self.adapter and not World.of(backbone.pipe).ip_adapter:
            return "it needs an IP-Adapter for the model, which declares none: name its file or folder (adapter)"
        return ""

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        backbone = victim.backbone
        name = self.adapter or str(World.of(backbone.pipe).ip_adapter)
        path = assets.find(name) or Path(name)
        encoder = Path(self.image_encoder) if self.image_encoder else None
        adapter = image_prompts.opened(path, encoder, backbone.denoiser)
        start = victim.start(sample, self.references, without=self.control)
        shown = adapter.embeddings([start.image])
        is_guided = sample.guidance_scale > 1 and not backbone.takes_guidance
        rows = torch.cat([torch.zeros_like(shown), shown]) if is_guided else shown
        tokens = adapter.tokens(rows.to(backbone.device, backbone.dtype)).cpu()
        for scale in self.scales:
            yield Attempt(change=ImagePrompt(name, tokens, scale, self.image_encoder))
