"""Train the T5 tower of Canvas on masked words and on their order, and build its tokeniser.

The tower reads both ways, has no start token and attends to its padding, as the T5 of Flux and Stable Diffusion 3
does. Masked words alone teach a tower this small nothing of which object is named first: a denoiser cannot tell from
its states what should stand where.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import models
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from erasure.assets.build.grounding import object_pieces
from erasure.assets.build.loop import cosine, log
from erasure.assets.build.tokenizer import CONTEXT, words
from erasure.assets.scenes import captions
from erasure.training.checkpoint import Checkpoint

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space before a word in the pieces of T5."""
MASK = "<extra_id_0>"
WORD, LETTER = -3.0, -9.0
"""Log-probabilities of pieces: a word always beats its letters."""


def pieces() -> list[tuple[str, float]]:
    """Pieces of the tokeniser, with their log-probabilities.

    One for every word of the world, also with a capital; letters, digits and marks spell the rest.
    """
    known = words()
    marks = [",", *string.ascii_lowercase, *string.digits, *(c for c in string.punctuation if c not in ",<>")]
    lower = [*((SPACE + word, WORD) for word in known), *((mark, LETTER) for mark in marks)]
    upper = [*((SPACE + word.capitalize(), WORD) for word in known), *((c, LETTER) for c in string.ascii_uppercase)]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, LETTER), *lower, *upper]


def tokenizer(folder: Path) -> T5TokenizerFast:
    """Write the tokeniser's files to `folder`."""
    made = T5TokenizerFast(vocab=pieces(), extra_ids=1, model_max_length=CONTEXT)
    assert isinstance(made.backend_tokenizer.model, models.Unigram)
    made.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def without_capitals(tokenizer: T5TokenizerFast) -> Tensor:
    """For each piece, the number of the same piece in small letters, `(pieces,)`."""
    known = tokenizer.get_vocab()
    ordered = sorted(known, key=known.__getitem__)
    return torch.tensor([known.get(piece.lower(), known[piece]) for piece in ordered])


def config(vocabulary: int, width: int = 256) -> T5Config:
    """A small T5 of version 1.1."""
    return T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=32, relative_attention_max_distance=64, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip


def masked(ids: Tensor, chosen: Tensor, mask: int, vocabulary: int) -> Tensor:
    """Hide chosen words: eight of ten behind a mask, one behind another word, one not at all (Devlin et al. 2018).

    Args:
        ids: `(captions, tokens)`.
        chosen: `(captions, tokens)` bool.
        mask: Id of the mask.
        vocabulary: Number of pieces.
    """
    kind = torch.rand(ids.shape)
    hidden = torch.where(kind < 0.8, mask, torch.where(kind < 0.9, torch.randint(vocabulary, ids.shape), ids))
    return torch.where(chosen, hidden, ids)


def ordered(ids: Tensor, things: Tensor) -> Tensor:
    """For each piece, whether it names the first object (0) or a later one (1); -1 where it names none.

    Args:
        ids: `(captions, tokens)`.
        things: Pieces that name objects.
    """
    named = torch.isin(ids, things)
    return torch.where(named, (named.cumsum(1) - 1).clamp(max=1), -1)


def train(
    folder: Path,
    steps: int,
    batch: int = 32,
    peak: float = 5e-4,
    hidden: float = 0.25,
    order: float = 0.5,
    seed: int = 4,
) -> None:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "t5"` and `folder / "tokenizer_2"`.

    Args:
        folder: Where the parts are kept.
        steps: Optimiser steps in all.
        batch: Captions per step.
        peak: Greatest learning rate of AdamW. T5 scales no attention: a greater one makes it look at one token alone,
            and at none for its place.
        hidden: Share of words that are to be told from the others.
        order: Weight of the loss on which object is named first.
        seed: Seeds everything.
    """
    torch.manual_seed(seed)
    pieces = tokenizer(folder / "tokenizer_2")
    model = T5EncoderModel(config(len(pieces)))
    head, place = nn.Linear(model.config.d_model, len(pieces)), nn.Linear(model.config.d_model, 2)
    parameters = [*model.parameters(), *head.parameters(), *place.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    state = Checkpoint(folder / "t5.ckpt", model=model, head=head, place=place, optimiser=optimiser)
    start = state.resume()
    torch.manual_seed(seed + start)
    small, mask = without_capitals(pieces), pieces.convert_tokens_to_ids(MASK)
    things = object_pieces(pieces)
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, steps, peak)
        texts = captions(batch, seed + 10_000 + step)
        # Unlike its users, nothing that trains a T5 lets it read much padding.
        ids = pieces(texts, padding="longest", truncation=True, return_tensors="pt").input_ids
        chosen = (torch.rand(ids.shape) < hidden) & (ids > pieces.unk_token_id)
        given = small[masked(ids, chosen, mask, len(pieces))]
        states = model(given).last_hidden_state
        logits, places = head(states), ordered(ids, things)
        hid = F.cross_entropy(logits[chosen], ids[chosen])
        named = places >= 0
        misplaced = F.cross_entropy(place(states)[named], places[named], reduction="sum") / named.sum().clamp(min=1)
        loss = hid + order * misplaced
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            right = (logits.argmax(-1) == ids)[chosen].float().mean().item()
            placed = (place(states).argmax(-1) == places)[named].float().mean().item()
            log(folder / "t5.jsonl", step=step + 1, loss=loss.item(), accuracy=right, order=placed)
            state.save(step + 1)
    with torch.no_grad():
        model.shared.weight.copy_(model.shared.weight[small])
    model.save_pretrained(folder / "t5")
