"""Concepts are learned from pictures: what changes, what does not, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import erasure
from erasure.cache import model_fingerprint
from erasure.errors import AttachError, ConceptError, ImageError, MaskError, OptionError, UnsupportedModelError
from erasure.learning import LearnedConcepts, learn_concepts
from erasure.training.run import Run
from tests.learning.conftest import QUICK, mask, picture
from tests.models import make_tiny_flux

PAIR = ("robot", "cactus")


def learn(pipe: Any, *tokens: str, **changed: Any) -> LearnedConcepts:
    given = {"images": picture("robot"), "masks": [mask()], "load": False, **QUICK, **changed}
    return learn_concepts(pipe, given.pop("images"), tokens or "<logo>", **given)


def learn_pair(pipe: Any, **changed: Any) -> LearnedConcepts:
    masks = [mask(0, *PAIR), mask(1, *PAIR)]
    return learn(pipe, "<a>", "<b>", **{"images": picture(*PAIR), "masks": masks, **changed})


def test_learning_leaves_the_pipeline_as_it_was(session_pipe: Any) -> None:
    before = model_fingerprint(session_pipe)
    made = learn_pair(session_pipe)
    assert model_fingerprint(session_pipe) == before
    assert made.tokens == ["<a>", "<b>"]
    assert {tuple(rows.shape) for rows in made.vectors["text_encoder"].values()} == {(2, 32)}


def test_every_token_learns_the_last_one_too(session_pipe: Any) -> None:
    made, start = learn_pair(session_pipe, steps=3), learn_pair(session_pipe, steps=1, lr=1e-12)
    for token in ("<a>", "<b>"):
        assert not torch.allclose(made.vectors["text_encoder"][token], start.vectors["text_encoder"][token])


def test_vectors_alone_change_no_weight(session_pipe: Any) -> None:
    made = learn(session_pipe, trained="vectors")
    assert not len(made.edits)
    assert learn(session_pipe).edits.deltas
    assert learn(session_pipe, rank=2).edits.low_rank


@pytest.mark.parametrize(
    "options", [{"sampling": "reweighted", "mask_every": 2}, {"preset": "paper", "prior_images": 1}]
)
def test_a_killed_training_goes_on_with_the_same_bits(
    session_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = {**options, "steps": 4, "masks": [mask(0, *PAIR), mask(1, *PAIR)]}
    whole = learn_pair(session_pipe, **options)

    class Killed(Exception):
        pass

    def kill(share: float) -> None:
        if share >= 0.5:
            raise Killed

    run = Run(checkpoints=tmp_path / "run", save_every=1)
    with pytest.raises(Killed):
        learn_pair(session_pipe, **{**options, "progress": kill}, run=run)
    resumed = learn_pair(session_pipe, **options, run=run)
    for token, rows in whole.vectors["text_encoder"].items():
        assert torch.equal(rows, resumed.vectors["text_encoder"][token])
    assert whole.edits.equals(resumed.edits)


def test_what_was_learned_is_drawn_and_erased(tiny_pipe: Any, concepts: LearnedConcepts) -> None:
    concepts.load_into(tiny_pipe)
    made = erasure.erase(tiny_pipe, "<logo>", "uce", attach=False, progress=False)
    assert made.config.base["learned_tokens"]["text_encoder"].keys() == {"<logo>"}


@pytest.mark.parametrize("name", ["cat", "a cat", "", "logo", "<lo go>", "<a\n>"])
def test_tokens_that_are_words_are_refused(session_pipe: Any, name: str) -> None:
    with pytest.raises(ConceptError, match="token"):
        learn(session_pipe, name)


def test_a_token_is_learned_once(tiny_pipe: Any, concepts: LearnedConcepts) -> None:
    with pytest.raises(ConceptError, match="twice"):
        learn(tiny_pipe, "<a>", "<a>")
    concepts.load_into(tiny_pipe)
    for name in ("<logo>", "<logo>_1"):
        with pytest.raises(ConceptError, match=r"already|part of the other"):
            learn(tiny_pipe, name)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("RGB", (64, 64), "white"), "one colour"),
        (Image.new("RGBA", (64, 64)), "transparent"),
        (picture("robot").resize((8, 8)).crop((0, 0, 4, 4)), "8 on a side"),
        (picture("robot").crop((20, 0, 28, 7)).resize((9, 7)), "8 on a side"),
    ],
    ids=["blank", "transparent", "tiny", "narrow"],
)
def test_pictures_without_a_subject_are_refused(session_pipe: Any, image: Image.Image, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        learn(session_pipe, images=image, masks=[])


def test_files_that_are_no_picture_are_refused(session_pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    for path in (tmp_path / "a.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError):
            learn(session_pipe, images=path)
    with pytest.raises(ImageError, match="no picture is given"):
        learn(session_pipe, images=[])


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ([mask(), mask()], "same place"),
        ([Image.new("L", (64, 64)), mask()], "covers 0.0%"),
        ([Image.new("L", (64, 64), 255), mask()], "covers 100"),
        ([mask()], "one mask for each token"),
    ],
    ids=["same", "empty", "whole", "too few"],
)
def test_masks_that_tell_nothing_apart_are_refused(session_pipe: Any, masks: list[Any], said: str) -> None:
    with pytest.raises(MaskError, match=said):
        learn_pair(session_pipe, masks=masks)


def test_the_alpha_of_a_logo_is_its_mask(session_pipe: Any) -> None:
    logo = picture("robot").convert("RGBA")
    logo.putalpha(mask().convert("L"))
    white = Image.composite(picture("robot"), Image.new("RGB", (64, 64), "white"), mask())
    made, other = learn(session_pipe, images=logo, masks=[]), learn(session_pipe, images=white)
    assert torch.equal(made.vectors["text_encoder"]["<logo>"], other.vectors["text_encoder"]["<logo>"])


def test_pictures_of_other_proportions_are_filled_up(session_pipe: Any) -> None:
    wide = picture(*PAIR).crop((0, 10, 64, 50))
    learn(session_pipe, "<a>", "<b>", images=wide, masks=[mask(i, *PAIR).crop((0, 10, 64, 50)) for i in range(2)])


def test_models_that_read_words_with_t5_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="T5"):
        learn(make_tiny_flux())


def test_like_must_name_a_token(session_pipe: Any) -> None:
    with pytest.raises(OptionError, match="none of the tokens"):
        learn(session_pipe, like={"<b>": "cat"})


def test_an_attached_erasure_is_in_the_way(tiny_pipe: Any, concepts: LearnedConcepts) -> None:
    erasure.erase(tiny_pipe, "cat", "uce", progress=False)
    with pytest.raises(AttachError, match="unload_erasures"):
        learn(tiny_pipe)
    with pytest.raises(AttachError, match="unload_erasures"):
        concepts.load_into(tiny_pipe)


def test_a_pipeline_in_use_elsewhere_is_not_touched(session_pipe: Any) -> None:
    twin = copy.copy(session_pipe)
    learn(session_pipe)
    assert "<logo>" not in twin.tokenizer.get_vocab()
