"""One prompt's optimisation: the loss, its gradient through every carrier, what is proposed, what is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import erasure
from erasure import Concept, ErasureManager
from erasure.backbones import Backbone, PromptTokens, TextTower, backbone_for
from erasure.carriers.embeddings import behind
from erasure.errors import DivergenceError, OptionError
from erasure.eval.attacks import SkippedPromptError, denoising
from erasure.eval.attacks.denoising import denoising_loss
from erasure.eval.attacks.prefixes import as_text, choosable
from erasure.eval.attacks.unlearndiffatk import UnlearnDiffAtk, read
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.eval.suites import Target
from erasure.interop import hooks, paths
from erasure.strategies import available, get
from tests.copies import copied

PROMPT = "a cat image in noto style"
ADAPTER = Path(__file__).parents[2] / "tiny" / "ip-adapter" / "stable-diffusion.safetensors"
QUICK = {
    "steps": 2, "vocabulary": 8, "retain_vocabulary": 2, "contexts": 2, "d_sae": 128, "target_rate": 0.1,
    "retain_rate": 1.0, "false_positive_rate": 1.0, "batch": 1, "retain_batch": 1, "rollout_steps": 2,
    "attack_steps": 1,
}  # fmt: skip
"""Cheap values of options; a strategy gets those that it has."""


@pytest.fixture
def sample() -> Sample:
    return Sample(
        "cat-noto-0", PROMPT, 5, "target", ("cat",), "noto", ("cat",), num_inference_steps=2, height=32, width=32
    )


@pytest.fixture
def victim(world_pipe: Any) -> Victim:
    """The tiny pipeline, and a judge that sees a cat in everything."""

    def judge(images: Any) -> list[Any]:
        return [type("Answer", (), {"object": "cat", "style": "noto"}) for _ in images]

    # A copy, not a twin: tests erase the pipeline afterwards.
    return Victim(world_pipe, copied(world_pipe), Target("cat", "object", ("cat",)), judge)


@pytest.fixture
def quick() -> UnlearnDiffAtk:
    return UnlearnDiffAtk(timesteps=3, iterations=2, learning_rate=0.1)


def erased(pipe: Any, strategy: str) -> None:
    """Attach an erasure of "cat", made cheaply."""
    names = {field.name for field in dataclasses.fields(get(strategy))}
    options = {name: value for name, value in {**QUICK, "adapter": str(ADAPTER)}.items() if name in names}
    if strategy == "mace":
        options |= {"retain_batch": 0, "contexts": 0}
    erasure.erase(pipe, Concept("cat", anchor="house"), strategy, progress=False, **options)


def setting(backbone: Backbone, draws: int = 1) -> dict[str, Any]:
    """Arguments of the loss: a prompt behind two tokens, an image, noise and levels."""
    generator = torch.Generator().manual_seed(0)
    tower = backbone.towers[0]
    prompts = behind(tower, tower.tokenize([PROMPT]), torch.tensor([[3, 50]] * draws))
    shape = (4, 16, 16)
    return {
        "backbone": backbone, "tower": tower, "prompts": prompts,
        "clean": torch.randn((1, *shape), generator=generator),
        "noise": torch.randn((draws, *shape), generator=generator), "t": torch.tensor([400.0] * draws),
    }  # fmt: skip


def loss_of(
    backbone: Backbone, tower: TextTower, prompts: PromptTokens, vectors: torch.Tensor, **rest: torch.Tensor
) -> torch.Tensor:
    """The loss of a model that is told by one text encoder."""
    return denoising_loss(backbone, backbone.compose({tower.component: read(tower, prompts, vectors)}), **rest)


# The prompt behind the tokens ---------------------------------------------------------------------------------------


def test_a_prefix_takes_the_place_of_padding(tiny_pipe: Any) -> None:
    tower = backbone_for(tiny_pipe).towers[0]
    prompt = tower.tokenize([PROMPT])
    prefix = torch.tensor([[3, 50], [7, 7]])
    made = behind(tower, prompt, prefix)
    assert made.ids.shape == (2, tower.max_length)
    for row, inserted in zip(made.ids.tolist(), prefix.tolist(), strict=True):
        own = tower.tokenizer(PROMPT).input_ids
        assert row[: len(own) + 2] == [own[0], *inserted, *own[1:]]
        assert set(row[len(own) + 2 :]) == {tower.tokenizer.pad_token_id}
    assert made.lengths == [prompt.lengths[0] + 2] * 2
    masked = prompt._replace(attention_mask=(torch.arange(77) < prompt.lengths[0]).long()[None])
    mask = behind(tower, masked, prefix).attention_mask
    assert mask is not None
    assert mask.sum(1).tolist() == made.lengths


def test_special_tokens_cannot_be_chosen(tiny_pipe: Any, tiny_pipe_original: Any) -> None:
    tower = backbone_for(tiny_pipe_original).towers[0]
    tokenizer = tower.tokenizer
    everything, words = (choosable(tower, vocabulary).tolist() for vocabulary in ("all", "words"))
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    assert set(everything) == set(range(len(tokenizer))) - special
    assert set(words) < set(everything)
    assert all(tokenizer(tokenizer.decode([w]), add_special_tokens=False).input_ids == [w] for w in words)
    assert tokenizer("kitten", add_special_tokens=False).input_ids[0] in words
    # The tokeniser of a copied pipeline writes marks where words end.
    copied = backbone_for(tiny_pipe).towers[0]
    assert choosable(copied, "words").tolist() == words
    assert as_text(copied, words) == as_text(tower, words)


# The loss and its gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_training_without_guidance(tiny_pipe: Any, prediction: str) -> None:
    tiny_pipe.scheduler.register_to_config(prediction_type=prediction)
    backbone = backbone_for(tiny_pipe)
    given = setting(backbone, draws=2)
    tower, prompts = given["tower"], given["prompts"]
    own = paths.token_table(tower.root).weight[prompts.ids[:, 1:3]]
    found = loss_of(vectors=own, **given)
    signal = tiny_pipe.scheduler.alphas_cumprod[400]
    noised = signal.sqrt() * given["clean"] + (1 - signal).sqrt() * given["noise"]
    encoded = tiny_pipe.text_encoder(prompts.ids).last_hidden_state
    predicted = tiny_pipe.unet(noised, given["t"], encoded).sample
    target = given["noise"]
    if prediction == "v_prediction":
        target = signal.sqrt() * given["noise"] - (1 - signal).sqrt() * given["clean"]
    torch.testing.assert_close(found, (predicted - target).square().mean())


def test_the_gradient_is_that_of_finite_differences(tiny_pipe: Any) -> None:
    backbone = backbone_for(tiny_pipe)
    given = setting(backbone)
    table = paths.token_table(given["tower"].root).weight.detach()
    generator = torch.Generator().manual_seed(1)
    points = torch.softmax(torch.randn(1, 2, len(table), generator=generator), -1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(vectors=points @ table, **given), points)
    direction = gradient / gradient.norm()

    @torch.no_grad()
    def moved(by: float) -> float:
        return float(loss_of(vectors=(points + by * direction) @ table, **given))

    reach = 0.02
    slope = (moved(reach) - moved(-reach)) / (2 * reach)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("strategy", sorted(available()))
def test_the_gradient_goes_through_every_erasure(tiny_pipe: Any, strategy: str) -> None:
    backbone = backbone_for(tiny_pipe)
    given = setting(backbone)
    table = paths.token_table(given["tower"].root).weight.detach()

    def measured() -> tuple[float, torch.Tensor]:
        vectors = table[given["prompts"].ids[:, 1:3]].requires_grad_()
        loss = loss_of(vectors=vectors, **given)
        return loss.item(), torch.autograd.grad(loss, vectors)[0]

    stock, _ = measured()
    erased(tiny_pipe, strategy)
    loss, gradient = measured()
    assert loss != stock
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().amax(-1) > 0).all()


# What is proposed ---------------------------------------------------------------------------------------------------


def test_attempts_are_texts_ahead_of_the_prompt(victim: Victim, sample: Sample, quick: UnlearnDiffAtk) -> None:
    found = list(quick.attempts(victim, sample))
    assert len(found) == quick.tries == 3
    tokenizer = victim.pipe.tokenizer
    for attempt in found:
        assert attempt.text.endswith(f" {PROMPT}")
        assert attempt.steps == 2
        assert attempt.loss > 0
        assert not attempt.cut
        read = len(tokenizer(attempt.text).input_ids) == len(tokenizer(PROMPT).input_ids) + 3
        assert read or attempt.changed
    assert list(quick.attempts(victim, sample)) == found
    other = dataclasses.replace(sample, seed=6)
    assert list(quick.attempts(victim, other)) != found


def test_noise_levels_rise_through_the_schedule(
    victim: Victim, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    drawn: list[torch.Tensor] = []

    def loss(backbone: Any, told: Any, clean: Any, noise: Any, t: Any) -> torch.Tensor:
        seen.append(tuple(t.tolist()))
        drawn.append(noise)
        return told.tokens.square().sum()

    monkeypatch.setattr(denoising, "denoising_loss", loss)
    list(UnlearnDiffAtk(iterations=2, noises=3).attempts(victim, sample))
    assert seen == [(level,) * 3 for level in range(10, 1000, 20) for _ in range(2)]
    assert len({noise.sum().item() for noise in drawn}) == 100
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_words_are_read_as_they_were_chosen(victim: Victim, sample: Sample, quick: UnlearnDiffAtk) -> None:
    words = dataclasses.replace(quick, vocabulary="words", noises=3)
    assert not any(attempt.changed for attempt in words.attempts(victim, sample))


def test_every_vector_of_a_learned_token_stays_in_the_prompt(
    victim: Victim, sample: Sample, quick: UnlearnDiffAtk, teach: Any
) -> None:
    teach(victim.pipe, "a", "cat", "a")
    tower = victim.backbone.towers[0]
    first, second, third = tower.word_ids("<my-pet>")
    words = dataclasses.replace(quick, vocabulary="words")
    asked = dataclasses.replace(sample, prompt="a photo of <my-pet>")
    for attempt in words.attempts(victim, asked):
        assert not attempt.changed
        assert tower.prompt_ids(attempt.text)[-4:-1] == [first, second, third]
    # Whoever writes the token gets all of its vectors.
    assert first not in choosable(tower, "words").tolist()
    assert {second, third} <= set(choosable(tower, "words").tolist())


def test_unsafe_concepts_take_more_tokens(victim: Victim, sample: Sample, quick: UnlearnDiffAtk) -> None:
    words = dataclasses.replace(quick, vocabulary="words")
    for unsafe, tokens, count in ((False, None, 3), (True, None, 5), (True, 2, 2)):
        attack = dataclasses.replace(words, tokens=tokens)
        (first, *_) = attack.attempts(victim, dataclasses.replace(sample, unsafe=unsafe))
        read = victim.pipe.tokenizer(first.text).input_ids
        assert len(read) == len(victim.pipe.tokenizer(PROMPT).input_ids) + count


def test_a_text_that_grows_too_long_is_said_to_be_cut(victim: Victim, sample: Sample, quick: UnlearnDiffAtk) -> None:
    tokenizer = victim.pipe.tokenizer
    prompt = " ".join(["cat"] * 72)  # 74 tokens of 77
    long = dataclasses.replace(sample, prompt=prompt)
    found = list(dataclasses.replace(quick, timesteps=6).attempts(victim, long))
    assert [len(tokenizer(each.text).input_ids) > 77 for each in found] == [each.cut for each in found]


def test_no_room_for_the_tokens(victim: Victim, sample: Sample, quick: UnlearnDiffAtk) -> None:
    long = dataclasses.replace(sample, prompt=" ".join(["cat"] * 73))
    with pytest.raises(SkippedPromptError, match="75 tokens and 3 adversarial ones are more than the 77"):
        list(quick.attempts(victim, long))


def test_no_reference_image_shows_the_concept(victim: Victim, sample: Sample, quick: UnlearnDiffAtk) -> None:
    seen = []

    def blind(images: Any) -> list[Any]:
        seen.extend(images)
        return [type("Answer", (), {"object": "dog", "style": "noto"}) for _ in images]

    victim.judge = blind
    with pytest.raises(SkippedPromptError, match=r"in none of 4 images that the original model draws"):
        list(quick.attempts(victim, sample))
    assert len(seen) == len({image.tobytes() for image in seen}) == 4


def test_the_attack_runs_on_the_erased_model_and_the_reference_on_the_original(
    victim: Victim, sample: Sample, quick: UnlearnDiffAtk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = victim.pipe
    erased(pipe, "diff_quickfix")
    seen: list[tuple[str, str]] = []
    call, drawing = type(pipe).__call__, False

    def spied(model: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def encode(*args: Any, **kwargs: Any) -> Any:
            seen.append(("drawing" if drawing else "attack", model))
            return forward(*args, **kwargs)

        return encode

    def drawn(*args: Any, **kwargs: Any) -> Any:
        nonlocal drawing
        drawing = True
        try:
            return call(*args, **kwargs)
        finally:
            drawing = False

    for model, encoder in (("erased", pipe.text_encoder), ("original", victim.stock.text_encoder)):
        monkeypatch.setattr(encoder, "forward", spied(model, encoder.forward))
    monkeypatch.setattr(type(pipe), "__call__", drawn)
    list(quick.attempts(victim, sample))
    assert set(seen) == {("drawing", "original"), ("attack", "erased")}
    seen.clear()
    victim.draw(sample, Attempt({"prompt": "a dog"}))
    assert set(seen) == {("drawing", "erased")}


# What is left behind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", [False, True])
def test_the_model_is_left_as_it_was(
    victim: Victim, sample: Sample, quick: UnlearnDiffAtk, learning: bool, tensors_of: Any, changed_tensors: Any
) -> None:
    pipe = victim.pipe
    erased(pipe, "uce")
    for component in (pipe.unet, pipe.text_encoder):
        component.requires_grad_(learning)
    before = tensors_of(pipe)
    proposals = quick.attempts(victim, sample)
    next(proposals)
    assert changed_tensors(before, pipe) == set()
    list(proposals)
    with pytest.raises(KeyboardInterrupt):
        interrupted(victim, sample, quick)
    assert changed_tensors(before, pipe) == set()
    for component in (pipe.unet, pipe.text_encoder):
        assert all(p.grad is None and p.requires_grad is learning for p in component.parameters())
    assert ErasureManager(pipe).verify() > 0
    table = paths.token_table(backbone_for(pipe).towers[0].root)
    assert hooks.find_hook(table, "erasure_injected_embeddings") is None


def interrupted(victim: Victim, sample: Sample, attack: UnlearnDiffAtk) -> None:
    """Ctrl-C while the prompt is encoded."""
    encoder = victim.pipe.text_encoder
    forward = encoder.encoder.forward
    calls = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    encoder.encoder.forward = stop
    try:
        list(attack.attempts(victim, sample))
    finally:
        del encoder.encoder.forward


def test_a_loss_that_is_not_finite_names_the_step(victim: Victim, sample: Sample, quick: UnlearnDiffAtk) -> None:
    proposals = quick.attempts(victim, sample)
    next(proposals)
    with torch.no_grad():
        victim.pipe.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(DivergenceError, match=r"the loss is nan at step 2 of 'a cat image.*noise level 500"):
        next(proposals)


# Options ------------------------------------------------------------------------------------------------------------


def test_the_full_size_is_the_paper_s() -> None:
    full = UnlearnDiffAtk.configured("full")
    assert full == UnlearnDiffAtk()
    assert (full.timesteps, full.iterations, full.learning_rate, full.weight_decay) == (50, 40, 0.01, 0.1)
    assert (full.vocabulary, full.noises, full.samples) == ("all", 1, 50)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iterations": 0}, "'iterations' is 0; allowed: a whole number, 1 or more"),
        ({"tokens": 1.5}, "'tokens' is 1.5"),
        ({"samples": True}, "'samples' is True"),
        ({"learning_rate": float("nan")}, "'learning_rate' is nan; allowed: a number, above 0"),
        ({"weight_decay": -0.1}, "'weight_decay' is -0.1"),
        ({"vocabulary": "some"}, "'vocabulary' is 'some'; allowed: 'all', 'words'"),
        ({"steps": 3}, "no option 'steps'; there are: samples, tokens"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        UnlearnDiffAtk.configured("smoke", **options)
