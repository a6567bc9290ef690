"""Learned tokens of several vectors: towers read them as the pipelines do, whatever the family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from erasure.backbones import TextTower, text_towers
from erasure.cache import model_fingerprint
from erasure.carriers.embeddings import require_tokens
from erasure.errors import ConceptError
from erasure.text.corpora import vocabulary
from erasure.text.words import align, subject_span

PROMPTS = ["a photo of <my-pet>", "<my-pet> and a dog, <my-pet>", "<your-pet> on <my-pet>", "a dog", ""]


def two_encoders(pipe: Any) -> StableDiffusionXLPipeline:
    config = CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"projection_dim": 32})
    torch.manual_seed(2)
    return StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=pipe.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(), tokenizer=pipe.tokenizer,
        tokenizer_2=copy.deepcopy(pipe.tokenizer),
    )  # fmt: skip


@pytest.fixture(params=["sd", "sdxl", "sdxl, unlike", "sdxl, second alone"])
def pipe(request: pytest.FixtureRequest, tiny_pipe: Any, teach: Any) -> Any:
    """A pipeline that knows `<my-pet>`, of two vectors or three, and `<your-pet>` of one."""
    made = tiny_pipe if request.param == "sd" else two_encoders(tiny_pipe)
    if request.param != "sdxl, second alone":
        teach(made, "a", "cat")
        teach(made, "dog", token="<your-pet>")
    if request.param != "sd":
        teach(made, *("a", "cat", "kitten")[: 2 if request.param == "sdxl" else 3], suffix="_2")
        teach(made, "dog", token="<your-pet>", suffix="_2")
    return made


def ids_of_the_pipeline(pipe: Any) -> dict[str, torch.Tensor]:
    """What the pipeline itself hands its text encoders for `PROMPTS`."""
    seen: dict[str, torch.Tensor] = {}
    encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    handles = [
        part.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, part in encoders.items()
    ]
    pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    for handle in handles:
        handle.remove()
    return seen


def test_towers_read_what_the_pipeline_reads(pipe: Any) -> None:
    wanted = ids_of_the_pipeline(pipe)
    for tower in text_towers(pipe):
        tokens = tower.tokenize(PROMPTS)
        assert torch.equal(tokens.ids, wanted[tower.component]), tower.component
        for row, prompt in enumerate(PROMPTS):
            ids = tower.prompt_ids(prompt)
            assert tokens.ids[row, : tokens.lengths[row]].tolist() == ids
            assert tower.tokenize([prompt]).lengths == [len(ids)]


@torch.no_grad()
def test_towers_give_what_the_pipeline_hands_its_denoiser(pipe: Any) -> None:
    made = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    states = [tower.encode(tower.tokenize(PROMPTS)).states for tower in text_towers(pipe)]
    torch.testing.assert_close(made, torch.cat(states, -1))


def test_a_copy_of_the_pipeline_is_asked_not_the_original(tiny_pipe: Any, teach: Any) -> None:
    twin = copy.copy(tiny_pipe)
    twin.register_modules(
        tokenizer=copy.deepcopy(tiny_pipe.tokenizer), text_encoder=copy.deepcopy(tiny_pipe.text_encoder)
    )
    stock, tower = text_towers(tiny_pipe)[0], text_towers(twin)[0]
    before = stock.word_ids("<my-pet>")
    teach(twin, "a", "cat", "dog")
    assert len(tower.word_ids("<my-pet>")) == 3
    assert stock.word_ids("<my-pet>") == before


def test_flux_reads_them_with_both_encoders(tiny_pipe: Any, teach: Any) -> None:
    made = FluxPipeline(
        vae=None, transformer=None, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=tiny_pipe.text_encoder,
        text_encoder_2=None, tokenizer=tiny_pipe.tokenizer, tokenizer_2=None,
    )  # fmt: skip
    teach(made, "a", "cat")
    tower = text_towers(made)[0]
    seen: list[Any] = []
    handle = made.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made._get_clip_prompt_embeds(PROMPTS, device="cpu")
    handle.remove()
    assert torch.equal(tower.tokenize(PROMPTS).ids, seen[0])


def test_a_tower_without_a_pipeline_reads_what_its_tokeniser_reads(tiny_pipe: Any, teach: Any) -> None:
    teach(tiny_pipe, "a", "cat")
    alone = TextTower("text_encoder", tiny_pipe.text_encoder, tiny_pipe.tokenizer, 77)
    assert len(alone.word_ids("<my-pet>")) == 1
    assert alone.tokenize(PROMPTS).ids.shape == (len(PROMPTS), 77)


def test_pipelines_that_write_nothing_out_stay_as_they_are(tiny_pipe: Any, teach: Any) -> None:
    teach(tiny_pipe, "a", "cat")
    other = StableDiffusion3Pipeline(
        vae=None, transformer=None, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=tiny_pipe.text_encoder,
        tokenizer=tiny_pipe.tokenizer, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    assert len(text_towers(other)[0].word_ids("<my-pet>")) == 1
    assert len(text_towers(tiny_pipe)[0].word_ids("<my-pet>")) == 2


# Where they stand ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tower(tiny_pipe: Any, teach: Any) -> TextTower:
    teach(tiny_pipe, "a", "cat", "a")
    teach(tiny_pipe, "dog", "dog", token="<your-pet>")
    return text_towers(tiny_pipe)[0]


def test_spans_hold_every_vector(tower: TextTower) -> None:
    assert subject_span(tower, "a photo of <my-pet> in ink style", "<my-pet>") == (4, 6, 4)
    assert subject_span(tower, "<my-pet> and <your-pet>", "<your-pet>") == (5, 6, 5)
    assert subject_span(tower, "<my-pet> and <your-pet>", "<my-pet>") == (1, 3, 1)
    assert subject_span(tower, "a van gogh painting of <my-pet>", "van gogh") == (2, 3, 3)
    # Words ahead of a learned token carry nothing of it.
    assert subject_span(tower, "a photo of a white <my-pet>", "white <my-pet>") == (5, 8, 6)


@pytest.mark.parametrize("anchor", ["dog", "<your-pet>", "", "white dog"])
def test_every_vector_answers_to_the_anchor(tower: TextTower, anchor: str) -> None:
    pair = align(tower, "a photo of {} in ink style", "<my-pet>", anchor)
    own, other = (tower.prompt_ids(prompt) for prompt in (pair.prompt, pair.anchor_prompt))
    assert (pair.start, pair.last) == (4, 6)
    replaced = tower.word_ids(anchor)[-1] if anchor else tower.word_ids("in")[0]
    assert [other[i] for i in pair.positions[4:7]] == [replaced] * 3
    assert [other[i] for i in pair.positions[7 : len(own)]] == own[7:]


def test_they_are_no_words_of_the_vocabulary(tower: TextTower) -> None:
    assert not any("pet" in word for word in vocabulary(tower, ()))


# Known and unknown --------------------------------------------------------------------------------------------------


def test_a_token_that_is_not_loaded_is_refused(tiny_pipe: Any, teach: Any) -> None:
    towers = text_towers(tiny_pipe)
    with pytest.raises(ConceptError, match="no token <my-pet>, so it would read its letters"):
        require_tokens(towers, ["a cat", "a <my-pet>"])
    teach(tiny_pipe, "a", "cat")
    require_tokens(towers, ["a <my-pet>", "cat", "a < b > c"])


def test_models_with_other_vectors_are_other_models(tiny_pipe: Any, teach: Any) -> None:
    other, renamed = copy.deepcopy(tiny_pipe), copy.deepcopy(tiny_pipe)
    stock = model_fingerprint(tiny_pipe)
    teach(tiny_pipe, "a", "cat")
    teach(renamed, "a", "cat", token="<your-pet>")
    teach(other, "a", "cat")
    taught = model_fingerprint(tiny_pipe)
    assert model_fingerprint(other) == taught != stock
    # One value of a large table, which the evenly spaced ones miss.
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight[-1, -1] += 1
    assert len({stock, taught, model_fingerprint(other), model_fingerprint(renamed)}) == 4
