"""Gates of several text encoders: one that opens opens those of the others, prompt by prompt."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from erasure import Erasure, ErasureManager
from erasure.artifact import ErasureConfig
from erasure.backbones import Backbone, TextTower, backbone_for
from erasure.carriers.edits import Edits
from erasure.carriers.features import EditedFeatures, FeatureEdit, Term
from erasure.errors import BypassedErasureWarning
from erasure.interop.pipelines import EncodedTogether
from erasure.pipelines import StableDiffusionXLErasurePipeline
from erasure.sae.stream import activations
from erasure.text.words import word_mask

LAYER = 1
CAT, DOG, HOUSE = "a photo of a cat", "a white dog", "the house"
TEXTS = (CAT, DOG, HOUSE, "")
NEVER = 1e4


@pytest.fixture
def pipe(tiny_xl: Any) -> Any:
    return tiny_xl


def gated(tower: TextTower, text: str | None, concepts: int = 1, **changed: Any) -> FeatureEdit:
    """An edit that takes what eight random directions find, behind a gate that only one text opens, or none.

    Each of several concepts has the same.
    """
    tokens = tower.tokenize(TEXTS)
    states = activations(tower, LAYER, tokens)
    words = word_mask(tokens.ids, tower.end, tower.leading)
    chosen = TEXTS.index(text) if text is not None else 0
    others = torch.cat([states[row][words[row]] for row in range(len(TEXTS)) if row != chosen])
    last = int(words[chosen].nonzero()[-2])
    probe = states[chosen, last] - others.mean(0)
    level = ((states[chosen, last] @ probe) + (others @ probe).max()) / 2
    assert text is None or states[chosen, last] @ probe > level
    generator = torch.Generator().manual_seed(1)
    pairs = torch.stack([torch.arange(concepts).repeat_interleave(8), torch.arange(8).repeat(concepts)])
    made = FeatureEdit(
        w_enc=torch.randn(32, 8, generator=generator), b_enc=torch.ones(8),
        w_dec=torch.randn(8, 32, generator=generator), threshold=torch.zeros(8), gain=-torch.ones(8),
        offset=torch.zeros(8), edits=pairs, votes=pairs, weight=torch.ones(8 * concepts), bias=torch.zeros(concepts),
        gate=torch.zeros(concepts), probe=probe[:, None].repeat(1, concepts), probe_bias=torch.zeros(concepts),
        probe_gate=torch.full((concepts,), NEVER if text is None else float(level)), filler=torch.zeros(0, 32),
        rule=torch.tensor(1), local=torch.tensor(0), first=torch.tensor(tower.leading), end=torch.tensor(tower.end),
    )  # fmt: skip
    return made._replace(**changed)


def erasure_of(pipe: Any, *texts: str | None, **changed: Any) -> Erasure:
    """An erasure of one concept; each text encoder has its gate on one of the texts, or on none."""
    towers = backbone_for(pipe).towers
    edits = {
        tower.key(tower.block_path(LAYER)): gated(tower, text, **changed)
        for tower, text in zip(towers, texts, strict=True)
    }
    config = ErasureConfig("itd", [{"target": "cat"}], backbone_for(pipe).family, carriers=["activations"])
    return Erasure(config, Edits(features=edits))


def encoded(pipe: Any, prompt: Any, prompt_2: Any = None, **options: Any) -> tuple[torch.Tensor, ...]:
    """What the denoiser is told, of each text encoder, and pooled: of the prompts, then of the negative ones."""
    with torch.no_grad():
        own, null, pooled, null_pooled = pipe.encode_prompt(prompt, prompt_2, device="cpu", **options)
    return (*own.chunk(2, -1), pooled, *null.chunk(2, -1), null_pooled)


def changed(a: torch.Tensor, b: torch.Tensor) -> list[bool]:
    """Rows that differ in a bit."""
    return [not torch.equal(one, other) for one, other in zip(a, b, strict=True)]


@pytest.mark.parametrize("opens", [0, 1], ids=["the first opens", "the second opens"])
def test_either_gate_opens_both(pipe: Any, opens: int) -> None:
    """Also that of the encoder that is run first, and no bit of any other prompt changes."""
    stock = encoded(pipe, list(TEXTS))
    manager = ErasureManager(pipe)
    manager.add(erasure_of(pipe, *((CAT, None) if opens == 0 else (None, CAT))), "cat")
    after = encoded(pipe, list(TEXTS))
    assert [changed(a, b) for a, b in zip(after[:3], stock[:3], strict=True)] == 3 * [[True, False, False, False]]
    alone = [encoded(pipe, text) for text in TEXTS]
    for row, one in enumerate(alone):
        torch.testing.assert_close(one[0][0], after[0][row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one[2][0], after[2][row], atol=1e-5, rtol=1e-5)
    manager.unload()
    assert "encode_prompt" not in vars(pipe)
    assert all(torch.equal(a, b) for a, b in zip(encoded(pipe, list(TEXTS)), stock, strict=True))


def test_it_is_the_edit_of_each_encoder_s_own_reading(pipe: Any) -> None:
    """An opened gate does what the same edit does behind a gate that is always open."""
    manager = ErasureManager(pipe)
    manager.add(erasure_of(pipe, None, CAT), "told")
    told = encoded(pipe, CAT)
    manager.unload()
    manager.add(erasure_of(pipe, CAT, CAT), "own")
    assert all(torch.equal(a, b) for a, b in zip(encoded(pipe, CAT), told, strict=True))


def test_encoders_that_are_told_other_prompts(pipe: Any) -> None:
    """Rows belong together, whatever each encoder reads in them."""
    first, second = [DOG, CAT, HOUSE, DOG], [CAT, DOG, DOG, HOUSE]
    stock = encoded(pipe, first, second)
    ErasureManager(pipe).add(erasure_of(pipe, CAT, CAT), "cat")
    after = encoded(pipe, first, second)
    assert [changed(a, b) for a, b in zip(after[:3], stock[:3], strict=True)] == 3 * [[True, True, False, False]]


def test_negative_prompts_open_gates_of_negative_prompts_only(pipe: Any) -> None:
    call = {"negative_prompt": CAT, "do_classifier_free_guidance": True}
    stock = encoded(pipe, DOG, **call)
    manager = ErasureManager(pipe)
    manager.add(erasure_of(pipe, None, CAT), "cat")
    after = encoded(pipe, DOG, **call)
    assert [changed(a, b)[0] for a, b in zip(after, stock, strict=True)] == 3 * [False] + 3 * [True]
    other = encoded(pipe, CAT, **{**call, "negative_prompt": DOG})
    assert torch.equal(other[0], after[3])
    assert torch.equal(other[3], stock[0])


def test_concepts_are_told_apart(pipe: Any) -> None:
    """Two concepts; what opens the second in one encoder leaves the first shut in the other."""
    made = erasure_of(pipe, None, CAT, concepts=2)
    first, second = made.edits.features
    one, two = made.edits.features.values()
    owner = torch.stack([torch.arange(8) // 4, torch.arange(8)])
    gates = torch.tensor([NEVER, float(two.probe_gate[1])])
    made.edits.features.update({first: one._replace(edits=owner), second: two._replace(probe_gate=gates)})
    ErasureManager(pipe).add(made, "cat")
    after = encoded(pipe, CAT)
    ErasureManager(pipe).unload()
    half = one._replace(edits=owner, gain=torch.tensor([0.0] * 4 + [-1.0] * 4), probe_gate=torch.full((2,), -NEVER))
    tower = backbone_for(pipe).towers[0]
    EditedFeatures.write(tower.module, {tower.block_path(LAYER): [(1.0, half)]})
    torch.testing.assert_close(encoded(pipe, CAT)[0], after[0])


def test_a_backbone_encodes_as_the_pipeline_does_and_an_encoder_by_itself_has_its_own_gate(pipe: Any) -> None:
    backbone = backbone_for(pipe)
    tower = backbone.towers[0]
    stock = tower.encode(tower.tokenize([CAT])).states
    ErasureManager(pipe).add(erasure_of(pipe, None, CAT), "cat")
    after = encoded(pipe, [CAT, DOG])
    with torch.no_grad():
        made: Any = Backbone.encode(backbone, [CAT, DOG])
    assert torch.equal(made.tokens, torch.cat(after[:2], -1))
    assert torch.equal(made.pooled, after[2])
    assert torch.equal(tower.encode(tower.tokenize([CAT])).states, stock)
    with torch.enable_grad():
        assert torch.equal(backbone.encode([CAT, DOG]).tokens, made.tokens)


def test_erasures_share_their_own_gates_only(pipe: Any) -> None:
    """A second erasure of one encoder alone neither tells nor is told."""
    tower = backbone_for(pipe).towers[0]
    single = erasure_of(pipe, None, None)
    single.edits.features = {tower.key(tower.block_path(LAYER)): gated(tower, None)}
    manager = ErasureManager(pipe)
    manager.add(single, "single")
    assert "encode_prompt" not in vars(pipe), "nothing is shared"
    assert torch.equal(encoded(pipe, CAT)[0], encoded(pipe, CAT)[0])
    manager.add(erasure_of(pipe, None, CAT), "both")
    both = encoded(pipe, CAT)
    manager.delete("single")
    assert all(torch.equal(a, b) for a, b in zip(encoded(pipe, CAT), both, strict=True))
    manager.disable()
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("route", ["deepcopy", "shallow copy", "twin", "drop-in", "image to image"])
def test_other_pipelines_on_the_same_encoders(pipe: Any, tiny_xl_original: Any, route: str) -> None:
    manager = ErasureManager(pipe)
    manager.add(erasure_of(pipe, None, CAT), "cat")
    wanted = encoded(pipe, CAT)
    if route == "deepcopy":
        other = copy.deepcopy(pipe)
    elif route == "shallow copy":
        other = copy.copy(pipe)
        ErasureManager(other).verify()
    elif route == "twin":
        other = manager.twin()
    elif route == "drop-in":
        other = StableDiffusionXLErasurePipeline.from_pipe(pipe)
    else:
        other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
        ErasureManager(other).adopt()
    assert vars(other)["encode_prompt"].owner is other
    assert all(torch.equal(a, b) for a, b in zip(encoded(other, CAT), wanted, strict=True))
    if route in ("deepcopy", "twin"):
        ErasureManager(other).unload()
        assert torch.equal(encoded(pipe, CAT)[0], wanted[0]), "the other one is its own"
    stock = manager.stock()
    assert not isinstance(vars(stock).get("encode_prompt"), EncodedTogether)
    assert torch.equal(encoded(stock, CAT)[0], encoded(tiny_xl_original, CAT)[0])


def test_a_pipeline_that_runs_its_encoders_apart_says_so(pipe: Any, draw: Any) -> None:
    """`from_pipe` of a stock class shares the encoders, and not what the pipeline calls them by."""
    manager = ErasureManager(pipe)
    manager.add(erasure_of(pipe, None, CAT), "cat")
    wanted = draw(pipe, CAT)
    other = StableDiffusionXLPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    with pytest.warns(BypassedErasureWarning, match="cat opened in one text encoder and stayed shut in another"):
        apart = draw(other, CAT)
    assert not torch.equal(apart, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BypassedErasureWarning)
        draw(other, DOG)
        assert ErasureManager(other).verify() >= 2
        assert torch.equal(draw(other, CAT), wanted)
        assert torch.equal(draw(pipe, CAT), wanted)


def test_where_words_are_edited_the_nearest_is_when_another_encoder_opened_the_gate(pipe: Any) -> None:
    tower = backbone_for(pipe).towers[0]
    tokens = tower.tokenize([CAT])
    stock = activations(tower, LAYER, tokens)
    words = word_mask(tokens.ids, tower.end, tower.leading)
    edit = gated(tower, None, local=torch.tensor(1)).on(stock.device)
    told = torch.ones(1, 1, dtype=torch.bool)
    change, opened = edit.delta(stock, words, told)
    score = edit.logits(stock, edit.latents(stock), True)[0, :, 0].masked_fill(~words[0], -torch.inf)
    assert change.any(-1)[0].nonzero()[:, 0].tolist() == [int(score.argmax())]
    assert bool(opened)
    replaced = gated(tower, None, local=torch.tensor(1), filler=stock[0].roll(1, 0)).on(stock.device)
    moved = replaced.delta(stock, words, told)[0].any(-1)[0]
    end = int(words[0].nonzero()[-1])
    assert moved.nonzero()[:, 0].tolist() == sorted({int(score.argmax()), *range(end, stock.shape[1])})
    # Its own word opens its own gate, and being told changes nothing.
    own = gated(tower, CAT, local=torch.tensor(1)).on(stock.device)
    assert torch.equal(own.delta(stock, words, told)[0], own.delta(stock, words)[0])


def test_a_prompt_is_remembered_with_what_others_told(pipe: Any) -> None:
    """The same text beside another one is another encoding."""
    ErasureManager(pipe).add(erasure_of(pipe, CAT, CAT), "cat")
    calls = [(DOG, CAT), (DOG, DOG), (DOG, CAT), (DOG, DOG)]
    made = [encoded(pipe, *call)[0] for call in calls]
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])
    assert not torch.equal(made[0], made[1])


def test_being_in_force_means_sharing_under_the_same_name(pipe: Any) -> None:
    tower = backbone_for(pipe).towers[0]
    edit, path = gated(tower, CAT), tower.block_path(LAYER)
    EditedFeatures.write(tower.module, {path: [Term(1.0, edit, "a")]})
    assert EditedFeatures.is_written(tower.module, {path: [Term(1.0, edit, "a")]})
    for other in (Term(1.0, edit, "b"), Term(1.0, edit), Term(0.5, edit, "a"), Term(1.0, gated(tower, CAT), "a")):
        assert not EditedFeatures.is_written(tower.module, {path: [other]})


def test_the_pooled_vector_follows_an_edit_in_the_middle_of_its_encoder(pipe: Any) -> None:
    stock = encoded(pipe, CAT)
    for edits_pooled, texts in ((False, (CAT, None)), (True, (None, CAT))):
        made = erasure_of(pipe, *texts)
        key = list(made.edits.features)[int(edits_pooled)]
        made.edits.features = {key: made.edits.features[key]}
        manager = ErasureManager(pipe)
        manager.add(made, "one")
        after = encoded(pipe, CAT)
        assert torch.equal(after[2], stock[2]) is not edits_pooled
        tower = backbone_for(pipe).tower("text_encoder_2")
        with torch.no_grad():
            output = tower.module(tower.tokenize([CAT]).ids, output_hidden_states=True)
        end = tower.tokenize([CAT]).lengths[0] - 1
        final = tower.root.final_layer_norm(output.hidden_states[-1])[:, end]
        torch.testing.assert_close(after[2], tower.module.text_projection(final))
        manager.unload()


def test_stock_pipelines_know_nothing_of_it(tiny_xl_original: Any) -> None:
    assert isinstance(tiny_xl_original, StableDiffusionXLPipeline)
    assert "encode_prompt" not in vars(tiny_xl_original)


@pytest.mark.compile
def test_compiled_encoders_are_told_too(pipe: Any) -> None:
    torch.compiler.reset()
    ErasureManager(pipe).add(erasure_of(pipe, None, CAT), "cat")
    wanted = encoded(pipe, [CAT, DOG])
    pipe.text_encoder.compile(backend="eager")
    for part, same in zip(encoded(pipe, [CAT, DOG]), wanted, strict=True):
        torch.testing.assert_close(part, same)
    torch.testing.assert_close(encoded(pipe, [DOG, CAT])[0][1], wanted[0][0])
