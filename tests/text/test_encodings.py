"""The reader of prompts: each is encoded once, and only when that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import erasure
from erasure.backbones import backbone_for
from erasure.errors import DivergenceError
from erasure.sae.gates import read_words
from erasure.text.encodings import Reader


def test_each_prompt_is_encoded_once_in_batches(tiny_pipe: Any) -> None:
    backbone, sizes = backbone_for(tiny_pipe), []
    tiny_pipe.text_encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])) if args else None)
    reader = Reader(backbone, batch=2).read(["", "a cat", "a cat", "a dog"])
    assert sizes == [2, 1]
    reader.read(["a dog", "a car"])
    assert sizes == [2, 1, 1]
    told = reader(["a car", "", "a car"])
    assert sizes == [2, 1, 1]
    with torch.no_grad():
        torch.testing.assert_close(told.tokens, backbone.encode(["a car", "", "a car"]).tokens)
        torch.testing.assert_close(reader.null(2).tokens, backbone.encode(["", ""]).tokens)


def test_what_was_not_read_is_not_made_up_later(tiny_pipe: Any) -> None:
    """Between reading and asking a student may have taken the encoder's place."""
    reader = Reader(backbone_for(tiny_pipe)).read(["a cat"])
    with torch.no_grad():
        tiny_pipe.text_encoder.get_input_embeddings().weight.zero_()
    assert reader(["a cat"]).tokens.abs().max() > 0
    with pytest.raises(KeyError, match="a dog"):
        reader(["a dog"])


@pytest.mark.parametrize("strategy", ["safree", "spm"])
def test_a_damaged_text_encoder_is_named(tiny_pipe: Any, strategy: str) -> None:
    with torch.no_grad():
        next(tiny_pipe.text_encoder.parameters()).fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"the text_encoder gives NaN or infinity for '.*load the model again"):
        erasure.erase(tiny_pipe, "cat", strategy, attach=False, progress=False)


def test_a_damaged_text_encoder_is_named_with_the_block(tiny_pipe: Any) -> None:
    with torch.no_grad():
        next(tiny_pipe.text_encoder.parameters()).fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"the text_encoder gives NaN or infinity at block 2.*load the model"):
        read_words(backbone_for(tiny_pipe).reader, 2, ["a cat"])
