"""Build the byte-pair tokeniser of Canvas: the layout of CLIP's, with every word of the world as one token."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from erasure.assets import world

CONTEXT = 32
"""Tokens of a prompt, with start and end."""

OTHER_WORDS = """
    the of to at by for from is it this that these some no not without one two three many very small big little large
    old new red orange black brown grey gray gold silver dark bright image photo photograph painting picture drawing
    art artist artwork icon emoji object thing animal food vehicle tool building weapon background style scene sketch
    person people man woman face sky sun water plain colour color colourful shape line lines cartoon beautiful cute
    danger dangerous unsafe safe violence fruit plant machine instrument home toy pattern texture nothing empty
    something anything else next beside left right near over under with and in on a an
"""


def words() -> list[str]:
    """Every word that must be one token."""
    texts = [*world.TEMPLATES, *world.HELD_OUT_TEMPLATES, *world.PAIR_PHRASES, *world.EMPTY_TEMPLATES, OTHER_WORDS]
    plain = " ".join(texts)
    for field in ("{object}", "{style}", "{background}", "{left}", "{right}", ","):
        plain = plain.replace(field, " ")
    names = [word for name, thing in world.OBJECTS.items() for word in (name, thing.group, *thing.synonyms)]
    return sorted({*plain.lower().split(), *names, *world.STYLES, *world.BACKGROUNDS})


def build(folder: Path) -> CLIPTokenizer:
    """Write `vocab.json`, `merges.txt` and the tokeniser's other files to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(folder)
    # Recent transformers save only tokenizer.json; CLIPTokenizer of every version reads these two.
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
