"""The original text encoder's embeddings, handed to the erased pipeline in the place of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning, backbone_for
from erasure.eval.attacks import Access, ControlledAttack, register
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample


@register("prompt_embeds")
@dataclass(frozen=True, kw_only=True)
class PromptEmbeds(ControlledAttack):
    """Encode the sample's own prompt with the original text encoders, and hand the embeddings to the erased pipeline.

    Whoever has the public model can make them. An erasure that lives in the text encoder is gone around by this; one
    in the denoiser is not. What is subtracted for guidance is the original model's as well.

    The control hands over embeddings that the erased pipeline's own text encoders made: what the way of calling does.
    """

    title: ClassVar[str] = "embeddings of the original text encoders"
    paper: ClassVar[str] = "a way around; see SECURITY.md"
    access: ClassVar[Access] = "embeddings"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1},
        "quick": {"samples": 10},
        "full": {},
    }

    @property
    def tries(self) -> int:
        """One."""
        return 1

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        source = victim.pipe if self.control else victim.stock
        yield Attempt(handed_over(backbone_for(source), sample))


@torch.no_grad()
def handed_over(backbone: Backbone, sample: Sample) -> dict[str, object]:
    """Arguments of a pipeline's call that hand over the encodings of a sample's prompt and of its negative prompt.

    Args:
        backbone: The model that encodes.
        sample: The sample.
    """
    own, empty = backbone.encode([sample.prompt]), backbone.encode([sample.negative_prompt])
    null = empty if sample.negative_prompt else backbone.null(empty)
    # Of a class that hands options on, the stock class's call below it says which there are.
    taken = next(names for kind in type(backbone.pipe).__mro__ if "prompt_embeds" in (names := _arguments(kind)))
    given = {**_named(own, ""), **_named(null, "negative_")}
    call = {name: tensor for name, tensor in given.items() if name in taken and tensor is not None}
    return {"prompt": None, "negative_prompt": None, **call}


def _arguments(kind: type) -> Mapping[str, object]:
    call = vars(kind).get("__call__")
    return {} if call is None else inspect.signature(call).parameters


def _named(told: Conditioning, ahead: str) -> dict[str, Tensor | None]:
    """Parts of a conditioning by the arguments that take them: the word `negative` stands first."""
    return {
        f"{ahead}prompt_embeds": told.tokens,
        f"{ahead}pooled_prompt_embeds": told.pooled,
        # As numbers, which pipelines add to scores: as truth values they would mean something else to attention.
        f"{ahead}prompt_attention_mask": None if told.mask is None else told.mask.to(told.tokens.dtype),
    }
