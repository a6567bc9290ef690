"""New tokens of a pipeline: allowed names, initial vectors, loading and removal."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.backbones import Backbone, TextTower, backbone_for
from erasure.concept import LONGEST_TEXT, PLACEHOLDER
from erasure.errors import ConceptError, UnsupportedModelError
from erasure.interop import learned, paths

MOST_VECTORS = 64
"""Largest number of vectors of one token; a prompt of CLIP has room for 75."""


def reading_towers(backbone: Backbone) -> list[TextTower]:
    """List the text encoders in which a learned token gets vectors: all of the pipeline's.

    Raises:
        UnsupportedModelError: The pipeline cannot load learned tokens, or the denoiser reads words by T5, whose
            tokeniser cannot learn any.
    """
    towers = backbone.towers
    unlike = next((tower.component for tower in towers if not tower.causal), None)
    if unlike is not None:
        raise UnsupportedModelError(
            f"a model of {backbone.family} like this reads words with a T5 ({unlike}), for which diffusers loads no "
            "learned tokens: take a model of Stable Diffusion or SDXL, whose words CLIP reads"
        )
    if not learned.loads_tokens(backbone.pipe):
        raise UnsupportedModelError(
            f"{type(backbone.pipe).__name__} loads no learned tokens (load_textual_inversion): take a model of Stable "
            "Diffusion or SDXL"
        )
    return towers


def check_names(names: Sequence[str], towers: Iterable[TextTower]) -> None:
    """Refuse names that cannot become new tokens, before anything is changed.

    Raises:
        ConceptError: There is no name; or one is empty, too long, has spaces or control characters, is given twice, is
            a word of the vocabulary, or has been learned already.
    """
    if not names:
        raise ConceptError("no token is named: name what the picture shows, for instance '<logo>'")
    for name in names:
        is_plain = isinstance(name, str) and 0 < len(name) <= LONGEST_TEXT
        if not is_plain or any(char.isspace() or unicodedata.category(char)[0] == "C" for char in name):
            raise ConceptError(
                f"{name!r:.80} cannot be a new token: it is one word without blanks, for instance '<my-logo>'"
            )
        if [other.casefold() for other in names].count(name.casefold()) > 1:
            raise ConceptError(
                f"the token {name!r} is named twice, capitals apart: every thing needs a name of its own"
            )
    for tower in towers:
        known = learned.ids_by_word(tower.tokenizer)
        for name in names:
            if name in known:
                raise ConceptError(
                    f"the {tower.component} has learned a token {name!r} already: unload it, or take another name"
                )
            if (clash := next((word for word in known if word in name or name in word), None)) is not None:
                raise ConceptError(
                    f"the {tower.component} has learned a token {clash!r}, and one of {name!r} and {clash!r} is part "
                    "of the other, so a tokeniser would read one for the other: take another name"
                )
            if PLACEHOLDER.fullmatch(name) is None:
                raise ConceptError(
                    f"{name!r} may be read as a word of prompts, or as a part of one: write a new token in angle "
                    f"brackets, '<{name.strip('<>') or 'logo'}>'"
                )
            if len(tower.word_ids(name)) < 2 and tower.tokenizer.unk_token_id not in tower.word_ids(name):
                raise ConceptError(f"{name!r} is a word of the {tower.component}'s vocabulary: take another name")


def start_vectors(
    tower: TextTower, like: str, count: int, spread: float, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """Make the initial vectors of a token, `(count, dim)` float32.

    Args:
        tower: Text encoder of the vectors.
        like: Words of the vocabulary that are similar to the thing, whose vectors are repeated; the mean of all words
            when empty.
        count: Number of vectors.
        spread: Random noise in standard deviations of the table's values, which makes all vectors different.
        generator: Draws the noise.
    """
    table = paths.token_table(tower.root).weight.detach().float().cpu()
    rows = table[tower.word_ids(like)] if like else table.mean(0, keepdim=True)
    rows = rows[[index % len(rows) for index in range(count)]]
    return rows + spread * table.std() * torch.randn(rows.shape, generator=generator)


def put_in(pipe: DiffusionPipeline, vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load learned tokens into a pipeline, all or none of them.

    Args:
        pipe: The pipeline.
        vectors: Vectors by component and token, `(count, dim)` each.
    """
    done: list[tuple[str, str]] = []
    try:
        for component, tokens in vectors.items():
            for name, rows in tokens.items():
                done.append((component, name))
                learned.add(pipe, component, name, rows)
    except BaseException:
        for component, name in reversed(done):
            learned.remove(pipe, component, name)
        raise


def beside(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Make a pipeline on the same denoiser with copies of text encoders and tokenisers, for new tokens."""
    made = copy.copy(pipe)
    copies = {tower.component: copy.deepcopy(tower.module) for tower in backbone_for(pipe).towers}
    readers = {name.replace("text_encoder", "tokenizer") for name in copies}
    made.register_modules(**copies, **{name: copy.deepcopy(getattr(pipe, name)) for name in readers})
    return made
