"""Words that draw: a loss that ties the cross-attention of an object's word to where the object is.

A denoiser this small otherwise draws from the end of the prompt and the padding, whose states sum up the whole prompt,
and hardly looks at the words. After TokenCompose (Wang et al. 2024, arXiv 2312.03626), with the renderer's own masks
in the place of a segmenter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from erasure.assets.scenes import Scene, render
from erasure.assets.world import OBJECTS

MOST = 2
"""Objects of a scene."""


def object_tokens(tokenizer: PreTrainedTokenizerBase, ids: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Find the token that names each object, `(captions, tokens, MOST)` float: 1 at the token, 0 elsewhere.

    An object may go by its name, a synonym or its group. Where both objects of a scene go by the same word, neither is
    marked.

    Args:
        tokenizer: Of the text tower; it has a token for every word of the world.
        ids: `(captions, tokens)`.
        scenes: What the captions describe.
    """
    marked = torch.zeros(*ids.shape, MOST)
    for row, scene in enumerate(scenes):
        for column, name in enumerate(scene.objects):
            marked[row, torch.isin(ids[row], object_pieces(tokenizer, (name,))), column] = 1
    return marked * (marked.sum(1, keepdim=True) == 1)


@lru_cache
def object_pieces(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...] = tuple(OBJECTS)) -> Tensor:
    """Tokens of every word that objects go by, with and without a capital.

    Args:
        tokenizer: It has a token for every word of the world.
        names: Of the objects.
    """
    words = [word for name in names for word in (name, OBJECTS[name].group, *OBJECTS[name].synonyms)]
    either = [*words, *(word.capitalize() for word in words)]
    return torch.tensor([tokenizer(word, add_special_tokens=False).input_ids for word in either]).flatten().unique()


def object_masks(scenes: Sequence[Scene], side: int) -> Tensor:
    """Cover of each object on a grid, `(scenes, MOST, side, side)` float in 0-1."""
    masks = torch.zeros(len(scenes), MOST, side, side)
    for row, scene in enumerate(scenes):
        if scene.objects:
            drawn = torch.from_numpy(render(scene).masks.astype(np.float32))
            masks[row, : len(drawn)] = F.adaptive_avg_pool2d(drawn, side)
    return masks


def without_end(states: Tensor, ids: Tensor, empty: Tensor, end: int) -> Tensor:
    """Text states whose end token and padding are those of the empty prompt, `(captions, tokens, dim)`.

    Args:
        states: `(captions, tokens, dim)`.
        ids: `(captions, tokens)`.
        empty: States of the empty prompt, `(tokens, dim)`.
        end: Id of the token that ends a prompt.
    """
    return torch.where(after_words(ids, end)[..., None], empty, states)


def after_words(ids: Tensor, end: int) -> Tensor:
    """Whether each token ends the prompt or stands behind its end, `(captions, tokens)` bool.

    Args:
        ids: `(captions, tokens)`.
        end: Id of the token that ends a prompt.
    """
    return (ids == end).cumsum(1) > 0


def grounding_loss(maps: Mapping[str, Tensor], masks: Tensor, marked: Tensor, share: float) -> Tensor:
    """Cross-entropy between the attention that words draw and a share of it on their objects, mean over layers.

    Args:
        maps: By layer, `(captions, MOST, rows, columns)`: what each image token pays to the objects' words.
        masks: `(captions, MOST, side, side)` in 0-1; see `object_masks`.
        marked: `(captions, MOST)` bool: objects whose word is known.
        share: What a word should draw where its object is.
    """
    losses = []
    for drawn in maps.values():
        wanted = share * F.adaptive_avg_pool2d(masks, (drawn.shape[2], drawn.shape[3]))
        each = F.binary_cross_entropy(drawn.clamp(1e-6, 1 - 1e-6), wanted, reduction="none").mean((2, 3))
        # A batch in which no word is known has no loss.
        losses.append(each[marked].sum() / marked.sum().clamp(min=1))
    return torch.stack(losses).mean()
