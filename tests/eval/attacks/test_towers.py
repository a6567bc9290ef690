"""Attacks on models that several text encoders tell the prompt: one is attacked, or each with a text of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasure.backbones import backbone_for
from erasure.carriers.embeddings import behind
from erasure.errors import OptionError
from erasure.eval.attacks.denoising import denoising_loss
from erasure.eval.attacks.prefixes import Prefixed, proposed
from erasure.eval.attacks.random_prefix import RandomPrefix
from erasure.eval.attacks.unlearndiffatk import UnlearnDiffAtk, read
from erasure.eval.attacks.victim import Victim
from erasure.eval.samples import Sample
from erasure.eval.suites import Target
from erasure.interop import paths

PROMPT = "a cat image in noto style"


@pytest.fixture
def sample() -> Sample:
    return Sample(
        "cat-noto-0", PROMPT, 5, "target", ("cat",), "noto", ("cat",), num_inference_steps=2, height=32, width=32
    )


def victim_of(pipe: Any) -> Victim:
    """A model that a judge sees a cat in everything of."""

    def judge(images: Any) -> list[Any]:
        return [type("Answer", (), {"object": "cat", "style": "noto"}) for _ in images]

    return Victim(pipe, pipe, Target("cat", "object", ("cat",)), judge)


@pytest.mark.parametrize("tower", [None, "text_encoder_2", "all"])
def test_one_text_encoder_or_all_are_attacked(tiny_xl: Any, sample: Sample, tower: Any) -> None:
    """All others read the text that the tokens of one make; each reads its own where all are attacked."""
    pipe = tiny_xl
    victim = victim_of(pipe)
    attack = UnlearnDiffAtk(timesteps=2, iterations=2, learning_rate=0.1, vocabulary="words", tower=tower)
    found = list(attack.attempts(victim, sample))
    for attempt in found:
        assert set(attempt.others) == ({"prompt_2"} if tower == "all" else set())
        assert all(text.endswith(f" {PROMPT}") for text in (attempt.text, *attempt.others.values()))
        assert not attempt.changed
        assert not attempt.cut
    if tower == "all":
        assert any(attempt.text != attempt.others["prompt_2"] for attempt in found)
    assert list(attack.attempts(victim, sample)) == found
    read: dict[str, list[str]] = {}
    for name in ("text_encoder", "text_encoder_2"):
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        getattr(pipe, name).register_forward_pre_hook(
            lambda _m, args, name=name, tokenizer=tokenizer: read.setdefault(name, []).extend(
                tokenizer.batch_decode(args[0], skip_special_tokens=True)
            )
        )
    victim.draw(sample, found[-1])
    told = [found[-1].text, found[-1].others.get("prompt_2", found[-1].text)]
    assert [read[name][0].replace("</w>", " ").split() for name in read] == [text.split() for text in told]


def test_the_loss_on_two_encoders_is_plain_arithmetic(tiny_xl: Any, sample: Sample) -> None:
    """The tokens that are searched are read by one, the text that was likeliest before by the other; pooled too."""
    pipe = tiny_xl
    victim, seen = victim_of(pipe), []
    backbone = victim.backbone
    real = backbone.predict
    backbone.predict = lambda x, t, told: seen.append((x, t, told)) or real(x, t, told)  # type: ignore[method-assign]
    attack = UnlearnDiffAtk(timesteps=2, iterations=1, learning_rate=0.1, vocabulary="words", tower="text_encoder_2")
    texts = [PROMPT, *(attempt.text for attempt in attack.attempts(victim, sample))]
    assert len(seen) == 2
    for (_, t, told), text in zip(seen, texts, strict=False):
        assert t.is_floating_point()
        assert torch.equal(told.tokens[..., :32], backbone.encode([text]).tokens[..., :32])
        assert not torch.equal(told.pooled, backbone.encode([text]).pooled)
        assert told.pooled.requires_grad
    assert [float(t) for _, t, _ in seen] == [250.0, 750.0]


def test_a_text_that_any_encoder_would_cut_is_said_to_be_cut(tiny_xl: Any, sample: Sample) -> None:
    pipe = tiny_xl
    backbone = backbone_for(pipe)
    pipe.tokenizer.model_max_length = 12
    tower = backbone_for(pipe).tower("text_encoder_2")
    given = Prefixed.of(tower, sample, 5)
    ids = tower.word_ids("dog") * 5
    assert proposed(backbone_for(pipe), [(given, ids)], steps=0, loss=None).cut
    pipe.tokenizer.model_max_length = 5  # which cuts the prompt itself
    assert not proposed(backbone_for(pipe), [(given, ids)], steps=0, loss=None).cut
    pipe.tokenizer.model_max_length = 77
    assert not proposed(backbone, [(given, ids)], steps=0, loss=None).cut


def test_a_text_encoder_that_is_not_there_is_refused(tiny_pipe_original: Any, sample: Sample) -> None:
    victim = victim_of(tiny_pipe_original)
    for attack in (UnlearnDiffAtk, RandomPrefix):
        with pytest.raises(OptionError, match=r"'tower' is 'text_encoder_2'.*pipeline's: text_encoder, or all"):
            next(attack(tower="text_encoder_2").attempts(victim, sample))
        with pytest.raises(OptionError, match="'tower' is 'unet'"):
            attack.configured("smoke", tower="unet")


# Families with a transformer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["flux", "stable-diffusion-3", "chroma"])
def flowing(request: pytest.FixtureRequest, tiny_models: Any) -> Any:
    """A tiny pipeline of a family that flows: read it, never change it."""
    return tiny_models[request.param]()


@pytest.mark.parametrize("tower", [None, "text_encoder", "all"])
def test_tokens_of_t5_and_of_clip_are_searched(flowing: Any, sample: Sample, tower: Any) -> None:
    """T5's are ahead of the whole prompt, for it has no start token; the noise levels are those of flow matching."""
    victim, seen = victim_of(flowing), []
    backbone = victim.backbone
    real = backbone.predict

    def predict(x: torch.Tensor, t: torch.Tensor, told: Any, guidance: Any = None) -> torch.Tensor:
        seen.append((x.detach(), float(t), guidance))
        return real(x, t, told, guidance)

    backbone.predict = predict  # type: ignore[method-assign]
    attack = UnlearnDiffAtk(timesteps=2, iterations=2, learning_rate=0.1, vocabulary="words", tower=tower)
    found = list(attack.attempts(victim, sample))
    assert [t for _, t, _ in seen] == [250.0, 250.0, 750.0, 750.0]
    assert {guidance for _, _, guidance in seen} == {None}
    others = [each.component.replace("text_encoder", "prompt") for each in backbone.towers[1:]]
    for attempt in found:
        assert list(attempt.others) == (others if tower == "all" else [])
        assert all(text.endswith(PROMPT) and text != PROMPT for text in (attempt.text, *attempt.others.values()))
        assert not attempt.changed
    assert victim.draw(sample, found[-1]).size == (32, 32)


def test_the_loss_is_that_of_flow_matching(flowing: Any) -> None:
    """`|e(x_t, c) - (eps - x)|^2` with `x_t = (1 - s) x + s eps`, no guidance, and a gradient in every vector."""
    backbone = backbone_for(flowing)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn((n, *backbone.latents.shape()), generator=generator) for n in (1, 2))
    t = torch.tensor([250.0, 750.0])
    vectors, parts = [], {}
    for tower in backbone.towers:
        prompts = behind(tower, tower.tokenize([PROMPT]), torch.tensor([[3, 5], [6, 7]]))
        assert prompts.ids[:, tower.leading : tower.leading + 2].tolist() == [[3, 5], [6, 7]]
        own = paths.token_table(tower.root).weight[torch.tensor([[3, 5], [6, 7]])].requires_grad_()
        vectors.append(own)
        parts[tower.component] = read(tower, prompts, own)
        torch.testing.assert_close(parts[tower.component].states, tower.encode(prompts).states)
    told = backbone.compose(parts)
    loss = denoising_loss(backbone, told, clean, noise, t)
    share = (t / 1000).view(2, 1, 1, 1)
    with torch.no_grad():
        found = backbone.predict((1 - share) * clean + share * noise, t, told)
    torch.testing.assert_close(loss, (found - (noise - clean)).square().mean())
    gradients = torch.autograd.grad(loss, vectors)
    assert all((gradient.abs().amax(-1) > 0).all() for gradient in gradients)
