"""The length of text and the size that an erasure was made with stand in its files, and other lengths are noticed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.artifact import CONFIG_FILE
from erasure.backbones import backbone_for
from erasure.errors import ArtifactError, BypassedErasureError, BypassedErasureWarning
from erasure.files import json_bytes

from .made import embeddings, hand_made, silent, small

PROMPT = "a photo of a house"
DECLARED = 32
"""Tokens of a text that the tiny models with a T5 declare."""


@pytest.fixture(params=["stable-diffusion-3", "flux", "chroma"])
def t5(request: pytest.FixtureRequest, originals: dict[str, Any]) -> Any:
    """A tiny pipeline with a T5."""
    return copy.deepcopy(originals[request.param])


def free(pipe: Any) -> str:
    return next(tower.component for tower in backbone_for(pipe).towers if not tower.causal)


def test_what_it_was_made_for_is_written(originals: dict[str, Any], tmp_path: Any) -> None:
    concept = Concept("cat", anchor="dog")
    for family, length in (("stable-diffusion", None), ("flux", DECLARED)):
        pipe = originals[family]
        made = erasure.erase(
            pipe, concept, "uce", vocabulary=8, saved_as="lora", attach=False, progress=False, tolerance=0.0
        )
        made.save(tmp_path / family)
        read = Erasure.read(tmp_path / family)
        assert (read.config.text_length, read.config.size) == (length, [32, 32])
        assert "32 x 32 pixels" in read.card()
        assert ("max_sequence_length" in read.card()) == (length is not None)


@pytest.mark.parametrize("change", [{}, {"text_length": 512}, {"size": [1024, 768]}])
def test_files_without_them_load_as_they_did(originals: dict[str, Any], tmp_path: Any, change: dict[str, Any]) -> None:
    made = hand_made(originals["flux"], "text_encoder_2")
    made.config.base = {"tensors": {key + ".weight": {} for key in made.low_rank}}
    file = made.save(tmp_path / "made") / CONFIG_FILE
    data = json.loads(file.read_text())
    del data["text_length"], data["size"]
    file.write_bytes(json_bytes({**data, **change}, CONFIG_FILE))
    config = Erasure.read(tmp_path / "made").config
    assert {"text_length": config.text_length, "size": config.size} == {"text_length": None, "size": None, **change}


@pytest.mark.parametrize("change", [{"text_length": 0}, {"text_length": "512"}, {"size": [32]}, {"size": [32, -1]}])
def test_lengths_that_cannot_be_are_refused(originals: dict[str, Any], tmp_path: Any, change: dict[str, Any]) -> None:
    made = hand_made(originals["flux"], "text_encoder_2")
    made.config.base = {"tensors": {key + ".weight": {} for key in made.low_rank}}
    file = made.save(tmp_path / "made") / CONFIG_FILE
    file.write_bytes(json_bytes({**json.loads(file.read_text()), **change}, CONFIG_FILE))
    with pytest.raises(ArtifactError, match=next(iter(change))):
        Erasure.read(tmp_path / "made")


def test_attaching_where_texts_have_another_length(t5: Any) -> None:
    manager = ErasureManager(t5)
    for component in (free(t5), "transformer"):
        with silent():
            manager.add(hand_made(t5, component, text_length=DECLARED), "same")
            manager.unload()
            manager.add(hand_made(t5, component), "unknown")
            manager.unload()
        with pytest.warns(BypassedErasureWarning, match=r"texts of 64 tokens .* pads them to 32"):
            manager.add(hand_made(t5, component, text_length=64), "other")
        manager.unload()
    t5.register_to_config(_name_or_path="")
    own = 256 if "text_encoder_3" in t5.components else 512
    with pytest.warns(BypassedErasureWarning, match=f"texts of 32 tokens .* pads them to {own}"):
        manager.add(hand_made(t5, free(t5), text_length=DECLARED), "other")


def test_a_clip_has_one_length(originals: dict[str, Any]) -> None:
    pipe = copy.deepcopy(originals["flux"])
    with silent():
        ErasureManager(pipe).add(hand_made(pipe, "text_encoder", text_length=64), "other")
        pipe(PROMPT, **small(pipe))


def test_stacked_erasures_of_mixed_lengths(t5: Any) -> None:
    manager = ErasureManager(t5)
    manager.add(hand_made(t5, free(t5), text_length=DECLARED), "one")
    with pytest.warns(BypassedErasureWarning, match=r"64 tokens .*'one', which is attached already, with texts of 32"):
        manager.add(hand_made(t5, free(t5), block=1, text_length=64), "two")


@pytest.mark.parametrize("edited", ["text", "denoiser"])
def test_calls_with_texts_of_another_length(t5: Any, route: Any, edited: str) -> None:
    component = free(t5) if edited == "text" else "transformer"
    manager = ErasureManager(t5)
    manager.add(hand_made(t5, component, text_length=DECLARED), "cat")
    pipe = route(t5)
    with silent():
        pipe(PROMPT, **small(pipe))
    other = {**small(pipe), "max_sequence_length": 16}
    with pytest.warns(BypassedErasureWarning, match=r"texts of 16 tokens .*cat.*max_sequence_length=32") as said:
        pipe(PROMPT, **other)
    assert len([w for w in said if issubclass(w.category, BypassedErasureWarning)]) == 1, "said at every step"
    # Embeddings of that length are no other thing.
    with pytest.warns(BypassedErasureWarning, match="texts of 24 tokens"):
        pipe(**embeddings(pipe, length=24), **small(pipe))
    manager.unload()
    manager.add(hand_made(t5, component, text_length=DECLARED), "cat", strict=True)
    with pytest.raises(BypassedErasureError, match="texts of 16 tokens"):
        pipe(PROMPT, **other)
