"""What does not go together is refused with a clear error, on every family, and nothing is changed by it."""

from __future__ import annotations

import copy
import json
from itertools import permutations
from typing import Any

import pytest
import torch

import erasure
from erasure import Concept, ErasureManager
from erasure.backbones import backbone_for
from erasure.carriers.embeddings import refuse_half_learned
from erasure.errors import ConceptError, OptionError, UnsupportedModelError, WrongBaseError
from erasure.pipelines import PIPELINES
from erasure.pipelines.mixin import check_kind

from .conftest import FAMILIES
from .made import hand_made

STOCK = {name: kind for name, kind in PIPELINES["text-to-image"].items() if "Erasure" not in name}


@pytest.mark.parametrize(("own", "other"), list(permutations(FAMILIES, 2)))
def test_an_erasure_of_one_family_on_another(originals: dict[str, Any], own: str, other: str) -> None:
    made = hand_made(originals[own], backbone_for(originals[own]).towers[0].component)
    manager = ErasureManager(originals[other])
    with pytest.raises(WrongBaseError, match=rf"'cat' is for {own}, this \w+ is {other}: load a model of {own}"):
        manager.add(made, "cat")
    assert manager.erasures == {}


def test_edits_of_two_text_encoders_where_there_is_one(originals: dict[str, Any]) -> None:
    made = hand_made(originals["stable-diffusion-xl"], "text_encoder", "text_encoder_2")
    made.config.family = "stable-diffusion"
    with pytest.raises(WrongBaseError, match=r"edits 'text_encoder_2', which this pipeline lacks"):
        ErasureManager(originals["stable-diffusion"]).add(made, "cat")


@pytest.mark.parametrize("edited", ["text_encoder_3", "transformer"])
def test_a_pipeline_whose_t5_was_left_out(originals: dict[str, Any], edited: str) -> None:
    pipe = copy.deepcopy(originals["stable-diffusion-3"])
    known = {"text_encoders": {"text_encoder_3": {"float32": "0" * 64}}} if edited == "transformer" else {}
    made = hand_made(pipe, edited, base=known)
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    with pytest.raises(WrongBaseError, match=r"text_encoder_3, which was left out of this .*text_encoder_3=None"):
        ErasureManager(pipe).add(made, "cat")
    assert ErasureManager(pipe).erasures == {}
    ErasureManager(pipe).add(hand_made(pipe, "text_encoder"), "other")


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2"])
def test_a_pipeline_that_reads_no_prompt(originals: dict[str, Any], missing: str) -> None:
    pipe = copy.copy(originals["flux"])
    made = hand_made(pipe, "transformer")
    pipe.register_modules(**{missing: None})
    try:
        with pytest.raises(UnsupportedModelError, match=f"has no {missing}, .* load the pipeline with"):
            ErasureManager(pipe).add(made, "cat")
    finally:
        pipe.register_modules(**{missing: getattr(originals["flux"], missing)})


def test_a_size_that_does_not_divide(originals: dict[str, Any], family: str) -> None:
    pipe = originals[family]
    step = backbone_for(pipe).latents.step
    for size in ((8 * step + 1, 8 * step), (8 * step, 8 * step - 1)):
        with pytest.raises(OptionError, match=rf"pixels, allowed are multiples of {step}: choose"):
            _ = backbone_for(pipe, size=size).latents


@pytest.mark.parametrize("place", ["text encoder", "door"])
def test_quantised_parts_make_no_erasure(stock: Any, place: str) -> None:
    backbone = backbone_for(stock)
    tower = backbone.towers[-1]
    component = tower.component if place == "text encoder" else backbone.denoiser_component
    entry = backbone.entry_layers()[0].module
    layer: Any = tower.root.get_submodule(tower.attention_out(0)) if place == "text encoder" else entry
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=f"the {component} is quantised .*make the erasure with the plain"):
        erasure.erase(stock, Concept("cat", anchor="dog"), "uce", progress=False)
    assert ErasureManager(stock).erasures == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_no_text_encoder_has_learned(originals: dict[str, Any], family: str) -> None:
    pipe = originals[family]
    for concept in (Concept("<my-pet>"), Concept("dog", anchor="<my-pet>"), Concept("dog", retain=("a <my-pet>",))):
        with pytest.raises(ConceptError, match=r"the model has no token <my-pet>, .* load the concept"):
            erasure.erase(pipe, concept, "uce", progress=False)
    assert ErasureManager(pipe).erasures == {}


@pytest.mark.parametrize("suffix", ["", "_2"])
def test_a_token_that_one_of_two_clips_has_learned(originals: dict[str, Any], teach: Any, suffix: str) -> None:
    pipe = copy.deepcopy(originals["stable-diffusion-xl"])
    teach(pipe, "cat", suffix=suffix)
    other = "text_encoder" if suffix else "text_encoder_2"
    for concept in (Concept("<my-pet>"), Concept("dog", anchor="<my-pet>"), Concept("dog", retain=("a <my-pet>",))):
        with pytest.raises(ConceptError, match=rf"<my-pet> .* learned, and that of {other} has not.*pipe\.{other}\)"):
            erasure.erase(pipe, concept, "uce", progress=False)
    towers = backbone_for(pipe).towers
    refuse_half_learned(towers, ["a cat"])
    teach(pipe, "cat", suffix="" if suffix else "_2")
    refuse_half_learned(towers, ["<my-pet>"])


@pytest.mark.parametrize(("named", "kind"), [(name, kind) for name in STOCK for kind in STOCK.values()])
def test_files_of_another_family(named: str, kind: Any, tmp_path: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": named, "_diffusers_version": "0.36.0"}))
    if STOCK[named] is kind:
        check_kind(kind, tmp_path, {})
        return
    with pytest.raises(UnsupportedModelError, match=rf"is a {named}, which {kind.__name__} is not for: use"):
        kind.from_pretrained(tmp_path)
