"""Text towers of every family, on tiny random pipelines of diffusers' own classes, and edits of their features."""

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

from erasure.backbones import TextTower, text_towers
from erasure.carriers.features import EditedFeatures, FeatureEdit
from erasure.errors import NoMatchingModuleError, UnsupportedModelError
from erasure.sae.stream import TokenStream, activations, block_fingerprint, block_of, reads_from
from erasure.text.words import word_mask

PROMPTS = ["a photo of a cat", "a dog", ""]
FAMILIES = ("sd", "sdxl", "sd3", "flux")


@pytest.fixture(scope="module")
def pipelines(tiny_pipe_factory: Any, tiny_tokenizer: Any, tiny_clip: Any, tiny_t5: Any) -> dict[str, Any]:
    flow = FlowMatchEulerDiscreteScheduler()
    words1, words2 = tiny_tokenizer, copy.deepcopy(tiny_tokenizer)
    clip1, clip2, proj1 = tiny_clip(words1, seed=1), tiny_clip(words2, True, seed=2), tiny_clip(words1, True, seed=3)
    t5_encoder, pieces = tiny_t5()
    return {
        "sd": tiny_pipe_factory(),
        "sdxl": StableDiffusionXLPipeline(
            vae=None, unet=None, scheduler=flow, text_encoder=clip1, text_encoder_2=clip2, tokenizer=words1,
            tokenizer_2=words2,
        ),
        "sd3": StableDiffusion3Pipeline(
            vae=None, transformer=None, scheduler=flow, text_encoder=proj1, text_encoder_2=clip2,
            text_encoder_3=t5_encoder, tokenizer=words1, tokenizer_2=words2, tokenizer_3=pieces,
        ),
        "flux": FluxPipeline(
            vae=None, transformer=None, scheduler=flow, text_encoder=clip1, text_encoder_2=t5_encoder,
            tokenizer=words1, tokenizer_2=pieces,
        ),
    }  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> str:
    return request.param


@pytest.fixture
def pipe(pipelines: dict[str, Any], family: str) -> Any:
    return copy.deepcopy(pipelines[family])


def test_prompts_are_tokenised_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned tokens of several vectors are looked for only where there are some."""
    prompts = ["", "van gogh, ink!", *("cat " * count for count in (30, 31, 74, 75, 76, 200))]
    for tower in text_towers(pipe):
        wanted = [min(len(tower.tokenizer(prompt).input_ids), tower.max_length) for prompt in prompts]
        with monkeypatch.context() as patch:
            asked: list[Any] = []
            call = type(tower.tokenizer).__call__

            def counted(self: Any, texts: Any, call: Any = call, asked: list[Any] = asked, **options: Any) -> Any:
                asked.append(texts)
                return call(self, texts, **options)

            patch.setattr(type(tower.tokenizer), "__call__", counted)
            patch.setattr(type(pipe), "maybe_convert_prompt", lambda *_: pytest.fail("tokenised again"), raising=False)
            assert tower.tokenize(prompts).lengths == wanted
        assert asked == [prompts]


def encoded(pipe: Any, family: str) -> list[torch.Tensor]:
    """What the pipeline itself hands its denoiser, for `PROMPTS`: sequences, and pooled vectors where there are."""
    if family == "sd":
        return [pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]]
    if family == "sdxl":
        made = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
        return [made[0], made[2]]
    if family == "sd3":
        made = pipe.encode_prompt(PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False)
        return [made[0], made[2]]
    sequence, pooled, _ = pipe.encode_prompt(PROMPTS, None, device="cpu")
    return [sequence, pooled]


def shutting(tower: TextTower, **changed: Any) -> FeatureEdit:
    """Takes everything that five random directions find, in every prompt, unless told otherwise."""
    generator = torch.Generator().manual_seed(9)
    edit = FeatureEdit(
        w_enc=torch.randn(32, 5, generator=generator), b_enc=torch.ones(5),
        w_dec=torch.randn(5, 32, generator=generator), threshold=torch.zeros(5),
        gain=torch.full((5,), -1.0), offset=torch.zeros(5),
        edits=torch.stack([torch.zeros(5, dtype=torch.int64), torch.arange(5)]),
        votes=torch.stack([torch.zeros(5, dtype=torch.int64), torch.arange(5)]), weight=torch.ones(5),
        bias=torch.zeros(1), gate=torch.tensor([-99.0]), probe=torch.zeros(32, 1), probe_bias=torch.zeros(1),
        probe_gate=torch.zeros(1), filler=torch.zeros(0, 32), rule=torch.tensor(0), local=torch.tensor(0),
        first=torch.tensor(tower.leading), end=torch.tensor(tower.tokenizer.eos_token_id),
    )  # fmt: skip
    return edit._replace(**changed)


@torch.no_grad()
def test_towers_give_what_the_pipeline_hands_its_denoiser(pipe: Any, family: str) -> None:
    towers = text_towers(pipe)
    assert [tower.component for tower in towers] == {
        "sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"],
        "sd3": ["text_encoder", "text_encoder_2", "text_encoder_3"], "flux": ["text_encoder", "text_encoder_2"],
    }[family]  # fmt: skip
    states = [tower.encode(tower.tokenize(PROMPTS)).states for tower in towers]
    sequence = encoded(pipe, family)[0]
    if family == "sd":
        expected = states[0]
    elif family == "sdxl":
        expected = torch.cat(states, -1)
    elif family == "sd3":
        clips = torch.cat(states[:2], -1)
        width = sequence.shape[-1]
        padded = torch.nn.functional.pad(clips, (0, width - clips.shape[-1]))
        expected = torch.cat([padded, torch.nn.functional.pad(states[2], (0, width - 32))], 1)
    else:
        expected = states[1]
    torch.testing.assert_close(sequence, expected)


@torch.no_grad()
def test_an_edit_of_any_block_reaches_the_denoiser_and_goes_without_trace(pipe: Any, family: str) -> None:
    before = encoded(pipe, family)
    for tower in text_towers(pipe):
        for layer in range(len(tower.blocks) + tower.consumed + 1):
            terms = {tower.block_path(layer): [(1.0, shutting(tower))]}
            EditedFeatures.write(tower.module, terms)  # type: ignore[arg-type]
            assert EditedFeatures.is_written(tower.module, terms)  # type: ignore[arg-type]
            after = encoded(pipe, family)
            assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), (tower.component, layer)
            EditedFeatures.write(tower.module, {})
            assert all(torch.equal(a, b) for a, b in zip(before, encoded(pipe, family), strict=True))


@torch.no_grad()
def test_the_edit_is_made_to_each_prompt_on_its_own(pipe: Any) -> None:
    for tower in text_towers(pipe):
        layer = len(tower.blocks) + tower.consumed
        stock = activations(tower, layer, tower.tokenize(PROMPTS))
        placed = shutting(tower).on(torch.device("cpu"))
        logits = placed.logits(stock, placed.latents(stock), False)
        scores = logits.masked_fill(~words(tower)[..., None], -torch.inf).amax(1)[:, 0]
        gate = scores.sort().values[1:].mean()
        edit = shutting(tower, gate=gate[None])
        EditedFeatures.write(tower.module, {tower.block_path(layer): [(1.0, edit)]})
        found = activations(tower, layer, tower.tokenize(PROMPTS))
        for row in range(len(PROMPTS)):
            assert torch.equal(found[row], stock[row]) == bool(scores[row] < gate), (tower.component, row)
            alone = activations(tower, layer, tower.tokenize([PROMPTS[row]]))[0]
            torch.testing.assert_close(alone, found[row], atol=1e-5, rtol=1e-5)
        # What is ahead of the first word never depends on the prompt.
        assert torch.equal(found[:, : tower.leading], stock[:, : tower.leading])
        EditedFeatures.write(tower.module, {})


def words(tower: TextTower) -> torch.Tensor:
    return word_mask(tower.tokenize(PROMPTS).ids, tower.end, tower.leading)


def test_words_are_where_the_tokeniser_puts_them(pipe: Any) -> None:
    for tower in text_towers(pipe):
        lengths = tower.tokenize(PROMPTS).lengths
        assert words(tower).sum(1).tolist() == [length - tower.leading for length in lengths]
        assert tower.leading == int(tower.causal)


def test_an_attack_sees_through_the_edit(pipe: Any) -> None:
    for tower in text_towers(pipe):
        layer = len(tower.blocks) + tower.consumed
        entry = tower.root.get_submodule(tower.block_path(0))
        weight = next(p for p in entry.parameters() if p.ndim == 2).requires_grad_()
        grads = []
        for terms in ({}, {tower.block_path(layer): [(1.0, shutting(tower))]}):
            EditedFeatures.write(tower.module, terms)  # type: ignore[arg-type]
            grads.append(torch.autograd.grad(tower.encode(tower.tokenize(PROMPTS)).states.square().sum(), weight)[0])
        EditedFeatures.write(tower.module, {})
        assert torch.isfinite(grads[1]).all()
        assert not torch.equal(*grads)


def test_streams_and_fingerprints_are_of_every_tower(pipe: Any) -> None:
    for tower in text_towers(pipe):
        stream = TokenStream(tower, 1, PROMPTS, batch_size=3)
        assert torch.equal(stream(0), stream(0))
        assert stream(0).shape[1] == 32
        assert reads_from(tower, 1, block_fingerprint(tower, 1))
        assert not reads_from(tower, 0, block_fingerprint(tower, 1))
        with pytest.raises(NoMatchingModuleError, match=tower.component):
            block_of(tower, len(tower.blocks) + tower.consumed + 1)


def test_a_pipeline_without_text_is_refused(pipelines: dict[str, Any]) -> None:
    bare = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="has no text encoder"):
        text_towers(bare)
    bare.register_modules(text_encoder=torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="neither CLIP's nor T5's"):
        text_towers(bare)


def test_sd3_without_its_t5_and_sdxl_refiners_keep_their_rules(pipelines: dict[str, Any]) -> None:
    sd3 = copy.deepcopy(pipelines["sd3"])
    sd3.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert [(tower.component, tower.consumed) for tower in text_towers(sd3)] == [
        ("text_encoder", -2), ("text_encoder_2", -2),
    ]  # fmt: skip
    refiner = copy.deepcopy(pipelines["sdxl"])
    refiner.register_modules(text_encoder=None, tokenizer=None)
    assert [(tower.component, tower.consumed) for tower in text_towers(refiner)] == [("text_encoder_2", -2)]
