"""Tokens ahead of a prompt: which can be chosen, and the prompts and texts that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.backbones.towers import PromptTokens
from erasure.eval.attacks import Attack, SkippedPromptError
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.interop import paths
from erasure.interop.protocols import Tokenizer

Towers = Literal["text_encoder", "text_encoder_2", "text_encoder_3", "all"]
"""A text encoder of a pipeline, or all of them."""
TOKENS = {"unsafe": 5, "other": 3}
"""Tokens ahead of a prompt (UnlearnDiffAtk: 5 for nudity, violence and illegal content, 3 for styles and objects)."""

_CHOOSABLE: WeakKeyDictionary[Tokenizer, dict[tuple[str, int], list[int]]] = WeakKeyDictionary()
"""Tokens that can be chosen, by tokeniser, vocabulary and how many tokens there are."""


@dataclass(frozen=True)
class Prefixed:
    """A prompt with room for tokens ahead of its first word."""

    tower: TextTower
    sample: Sample
    count: int
    """Tokens ahead."""
    prompt: PromptTokens
    """The sample's prompt without them."""

    @classmethod
    def of(cls, tower: TextTower, sample: Sample, count: int | None) -> Prefixed:
        """Tokenise the sample's prompt.

        Args:
            tower: The text encoder.
            sample: The prompt.
            count: Tokens ahead of it; as many as are usual for such a concept (`TOKENS`) when left out.

        Raises:
            SkippedPromptError: There is no room for so many.
        """
        count = count or TOKENS["unsafe" if sample.unsafe else "other"]
        prompt = tower.tokenize([sample.prompt])
        if prompt.lengths[0] + count > tower.max_length:
            raise SkippedPromptError(
                f"{prompt.lengths[0]} tokens and {count} adversarial ones are more than the {tower.max_length} of "
                f"{tower.component}: {sample.prompt!r}"
            )
        return cls(tower, sample, count, prompt)

    def text(self, ids: Sequence[int]) -> str:
        """The prompt as text, behind some tokens."""
        return f"{as_text(self.tower, ids)} {self.sample.prompt}"

    def is_changed(self, ids: Sequence[int]) -> bool:
        """Whether the tokeniser reads that text as other tokens."""
        own, leading = self.prompt.ids[0, : self.prompt.lengths[0]].tolist(), self.tower.leading
        return self.tower.prompt_ids(self.text(ids)) != [*own[:leading], *ids, *own[leading:]]


def proposed(
    backbone: Backbone, chosen: Sequence[tuple[Prefixed, Sequence[int]]], *, steps: int, loss: float | None
) -> Attempt:
    """What is tried with tokens ahead of a prompt.

    Args:
        backbone: The model.
        chosen: Tokens for one text encoder, and then all of them read the text that they make; or for each of them,
            and then each reads its own.
        steps: See `Attempt`.
        loss: See `Attempt`.
    """
    texts = {given.tower.component: given.text(ids) for given, ids in chosen}
    text, prompt = next(iter(texts.values())), chosen[0][0].sample.prompt

    def cuts(tower: TextTower) -> bool:
        """Whether words of the prompt are cut off that were read without the tokens ahead."""
        lengths = [len(tower.prompt_ids(each)) for each in (prompt, texts.get(tower.component, text))]
        return lengths[0] <= tower.max_length < lengths[1]

    # One text alone is the prompt, whichever text encoder it was chosen for: all others read it too.
    others = {argument_of(name): each for name, each in list(texts.items())[1:]}
    return Attempt(
        {"prompt": text, **others}, steps=steps, loss=loss,
        changed=any(given.is_changed(ids) for given, ids in chosen), cut=any(map(cuts, backbone.towers)),
    )  # fmt: skip


def argument_of(component: str) -> str:
    """Argument of a pipeline's call that a text encoder reads: `prompt_2` of `text_encoder_2`."""
    return component.replace("text_encoder", "prompt")


def chosen_towers(attack: Attack, backbone: Backbone, tower: str | None) -> list[TextTower]:
    """The text encoders that tokens are chosen for: one, or every one its own.

    Args:
        attack: Whose option it is.
        backbone: The model.
        tower: Name of its component, or `all`; the first whose tokens the denoiser reads when left out.

    Raises:
        OptionError: The pipeline has none of that name.
    """
    known = {each.component: each for each in backbone.towers}
    if tower == "all":
        return list(known.values())
    if tower is not None and tower not in known:
        attack.refuse("tower", tower, f"one of the pipeline's: {', '.join(known)}, or all")
    return [backbone.reader if tower is None else known[tower]]


def choosable(tower: TextTower, vocabulary: str) -> Tensor:
    """Ids of the tokens that an attack may choose, on the tower's device.

    Args:
        tower: The text encoder.
        vocabulary: `all` but special tokens, or `words`: those that decode to a text that is read as the same token.
    """
    tokenizer = tower.tokenizer
    # Every prompt of an attack asks, and reading a vocabulary anew takes seconds where it is large.
    known = _CHOOSABLE.setdefault(tokenizer, {})
    ids = known.get((vocabulary, len(tokenizer)))
    if ids is None:
        special = set(tokenizer.all_special_ids)
        ids = [index for index in range(len(tokenizer)) if index not in special]
        if vocabulary == "words":
            ids = [index for index in ids if tower.word_ids(as_text(tower, [index])) == [index]]
        known[vocabulary, len(tokenizer)] = ids
    return torch.tensor(ids, device=paths.token_table(tower.root).weight.device)


def as_text(tower: TextTower, ids: Sequence[int]) -> str:
    """Tokens as the text that a prompt would have for them."""
    # A deep copy of CLIP's tokeniser (transformers 5) forgets to take the marks of words' ends off.
    return " ".join(tower.tokenizer.decode(ids).replace("</w>", " ").split())
