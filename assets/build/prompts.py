"""Prompts as the denoisers of the larger families are told of them: in parts, any of which can be left out.

Leaving parts out at random while training makes each part carry the prompt by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from erasure.assets.build.grounding import after_words
from erasure.assets.build.tokenizer import CONTEXT


class Read(NamedTuple):
    """What a tower makes of captions."""

    states: Tensor
    """`(captions, tokens, width)`."""
    pooled: Tensor | None
    """`(captions, width)`; T5 has none."""
    after: Tensor
    """Whether a token ends the prompt or pads it, `(captions, tokens)` bool."""


class Told(NamedTuple):
    """Captions in parts."""

    parts: Mapping[str, Tensor]
    """Tokens `(captions, tokens, width)` or pooled `(captions, width)`, by name."""
    after: Mapping[str, Tensor]
    """For each part with tokens, whether they end or pad the prompt, `(captions, tokens)` bool."""


@dataclass(frozen=True)
class Tower:
    """A text tower with its tokeniser.

    Of CLIP, tokens are read before the last block, as Stable Diffusion XL and 3 read them.
    """

    model: CLIPTextModel | CLIPTextModelWithProjection | T5EncoderModel
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Read:
        """Read captions, padded to the full length."""
        ids = ids_of(self.tokenizer, captions).to(self.model.device)
        after = after_words(ids, self.tokenizer.eos_token_id)
        if isinstance(self.model, T5EncoderModel):
            return Read(self.model(ids).last_hidden_state, None, after)
        output = self.model(ids, output_hidden_states=True)
        projected = isinstance(self.model, CLIPTextModelWithProjection)
        return Read(output.hidden_states[-2], output.text_embeds if projected else output.pooler_output, after)


@dataclass
class Prompts:
    """Captions for a training, with parts left out at random.

    Args:
        encode: Gives the parts of captions.
        shares: How often each part is left out. Never are all parts of a caption.
        emptied: Share of captions whose end tokens and padding say nothing, so that the words alone do.
        thinned: Share of captions of which half of each part's tokens say nothing, so that a part must say what
            another does not: without these, a denoiser heeds no other part while it is told one whole.
        absent: What stands for a part that is left out; the empty prompt's where nothing is given.
    """

    encode: Callable[[list[str]], Told]
    shares: Mapping[str, float]
    emptied: float
    thinned: float = 0.2
    absent: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.empty = self.encode([""]).parts

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """The parts of captions."""
        told = self.encode(captions)
        gone = left_out(len(captions), self.shares)
        words_alone, thin = (torch.rand(len(captions)) < share for share in (self.emptied, self.thinned))
        parts = {}
        for name, states in told.parts.items():
            if name in told.after:
                chosen = thin[:, None] & (torch.rand(states.shape[:2]) < 0.5)
                bare = chosen.to(states.device) | (words_alone.to(states.device)[:, None] & told.after[name])
                states = torch.where(bare[..., None], self.empty[name], states)
            without = gone[name].to(states.device).view(-1, *[1] * (states.ndim - 1))
            parts[name] = torch.where(without, self.absent.get(name, self.empty[name]), states)
        return parts

    def said(self, parts: Mapping[str, Tensor], name: str) -> Tensor:
        """Tell which tokens of a part differ from an empty prompt's, `(captions, tokens)` bool.

        Args:
            parts: Of captions.
            name: Of the part.
        """
        silent = [self.empty[name], self.absent.get(name, self.empty[name])]
        return torch.stack([(parts[name] != states).any(-1) for states in silent]).all(0)


def ids_of(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    """Tokens of captions as a `Tower` reads them, `(captions, tokens)`."""
    settings: dict[str, Any] = {"padding": "max_length", "max_length": CONTEXT, "truncation": True}
    return tokenizer(captions, return_tensors="pt", **settings).input_ids


def left_out(count: int, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """Captions of which each part is left out, `(count,)` bool by part: each by its share, but never all of one."""
    gone = torch.rand(len(shares), count) < torch.tensor(list(shares.values()))[:, None]
    return dict(zip(shares, gone & ~gone.all(0), strict=True))
