"""Score distillation: its loss against plain arithmetic in float64, and both players on one network."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.backbones import backbone_for
from erasure.interop import scopes
from erasure.text.encodings import Reader
from erasure.training.distillation import Guiding, Kind, ScoreDistillation, identity, short_identity
from erasure.training.generator import OneStepGenerator, one_step
from erasure.training.loop import Share, Trainer
from erasure.training.states import Scene
from erasure.training.student import LowRankStudent
from erasure.training.trajectories import rolling_out
from erasure.training.turns import Descent

SCENES = [Scene("a photo of a cat", ("a photo of a dog",)), Scene("a house", ("a car",))]
LEVEL, LEVELS = 800, (100, 600)


def tensors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_the_loss_is_the_papers_sum(alpha: float) -> None:
    """`[(1 - alpha) |f - g|^2 + (f - g)(g - x)] / w`, the form of Zhou et al., row by row."""
    real, fake, drawn = tensors(3)
    found = identity(real, fake, drawn, alpha)
    for row in range(3):
        f, g, x = (part[row].flatten() for part in (real, fake, drawn))
        weight = float((x - f).abs().mean())
        wanted = ((1 - alpha) * (f - g) @ (f - g) + (f - g) @ (g - x)) / weight
        assert float(found[row]) == pytest.approx(float(wanted), rel=1e-12)


def test_alpha_one_is_the_short_form() -> None:
    real, fake, drawn = (part.requires_grad_() for part in tensors(3))
    long, short = identity(real, fake, drawn, 1.0), short_identity(real, fake, drawn)
    torch.testing.assert_close(long, short)
    grads = [torch.autograd.grad(loss.sum(), (real, fake, drawn), retain_graph=True) for loss in (long, short)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_plain_arithmetic() -> None:
    """With the weight as a number: it has no gradient."""
    real, fake, drawn = (part.requires_grad_() for part in tensors(3))
    found = torch.autograd.grad(identity(real, fake, drawn, 1.2).sum(), (real, fake, drawn))
    f, g, x = (part.detach() for part in (real, fake, drawn))
    weight = (x - f).abs().mean((1, 2, 3), keepdim=True)
    # d/df, d/dg and d/dx of (f - g)(f - x) - alpha (f - g)^2
    wanted = ((f - x) + (f - g) - 2.4 * (f - g), -(f - x) + 2.4 * (f - g), -(f - g))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other / weight)


def test_what_is_drawn_exactly_has_a_finite_loss() -> None:
    real, fake, _ = tensors(3)
    assert torch.isfinite(identity(real, fake, real.clone(), 1.2)).all()


def method_on(pipe: Any, *, alpha: float = 1.2, guiding: Guiding | None = None, rank: int = 2) -> ScoreDistillation:
    backbone = backbone_for(pipe)
    layers = [f"mid_block.attentions.0.transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v")]
    generator, fake = (
        LowRankStudent(backbone.denoiser, layers, rank, torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    with torch.no_grad():
        for number, up in enumerate([*generator.up, *fake.up]):
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(number)))
    prompts = Reader(backbone).read(["", *(text for scene in SCENES for text in (scene.prompt, *scene.asks))])
    source = OneStepGenerator(backbone, SCENES, prompts, generator, LEVEL, LEVELS, 0)
    kinds = [Kind("forget", source, 2, 1.0, 0.5)]
    return ScoreDistillation(
        kinds=kinds, generator=generator, fake=fake, alpha=alpha, guiding=guiding or Guiding(), seed=0
    )  # fmt: skip


@pytest.fixture
def pipe(tiny_pipe: Any) -> Any:
    tiny_pipe.to(torch.float64)
    with scopes.frozen(tiny_pipe.unet):
        yield tiny_pipe


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (2.0, 1.5, 3.0)], ids=["unguided", "long and short"])
def test_the_gradient_of_an_update_is_plain_arithmetic(pipe: Any, scales: tuple[float, float, float]) -> None:
    """Network by network, with the LoRA written into the weights, in float64."""
    teacher, fake, learning = scales
    method = method_on(pipe, guiding=Guiding(teacher=teacher, fake=fake, learning=learning, dropped=0.0))
    drawn = method.prepare(0, Share(0, 1))
    found = torch.autograd.grad(method.losses(drawn)["forget"], list(method.generator.parameters()))
    backbone, source = method.source.backbone, method.source
    para = backbone.parametrisation
    noise = backbone.noise([int(seed) for seed in seeds(method, drawn)])

    def ask(student: Any, x: Tensor, t: Tensor, prompts: list[Any], scale: float) -> Tensor:
        def call(texts: list[Any]) -> Tensor:
            if student is None:
                return backbone.predict(x, t, source.prompts(texts))
            with student.active():
                return backbone.predict(x, t, source.prompts(texts))

        own, null = call(prompts), call([None] * len(x))
        return para.clean((null + scale * (own - null)).float(), x.float(), t)

    x_g = ask(method.generator, noise, torch.full((2,), LEVEL), drawn.prompts, 1.0)
    torch.testing.assert_close(x_g, drawn.images)
    x, t, _ = source.noised(x_g, drawn.numbers, "real")
    f, g = (
        ask(who, x.double(), t, prompts, scale)
        for who, prompts, scale in ((None, drawn.teachers, teacher), (method.fake, drawn.prompts, fake))
    )
    weight = (x_g - f).detach().abs().mean((1, 2, 3), keepdim=True)
    wanted = ((f - g) * ((f - x_g) - 1.2 * (f - g)) / weight).mean()
    for one, other in zip(found, torch.autograd.grad(wanted, list(method.generator.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert any(part.abs().max() > 0 for part in found)


def seeds(method: ScoreDistillation, drawn: Any) -> list[int]:
    from erasure.training.states import stable_seed

    return [stable_seed(method.source.seed, "generator", number) for number in drawn.numbers]


def test_each_turn_moves_its_own_player(tiny_pipe: Any) -> None:
    with scopes.frozen(tiny_pipe.unet), rolling_out(backbone_for(tiny_pipe)):
        method = method_on(tiny_pipe)
        drawn = method.prepare(0, Share(0, 1))
        fake, drawing = (list(player.parameters()) for player in (method.fake, method.generator))
        (term,) = method.fake_losses(drawn).values()
        assert all(part is None for part in torch.autograd.grad(term, drawing, allow_unused=True))
        assert all(
            part.abs().max() > 0 for part in torch.autograd.grad(method.fake_losses(drawn)["fake_forget"], fake)
        )
        (term,) = method.losses(drawn).values()
        assert all(part.abs().max() > 0 for part in torch.autograd.grad(term, drawing, retain_graph=True))


def test_the_generator_waits_while_the_other_learns(tiny_pipe: Any) -> None:
    with scopes.frozen(tiny_pipe.unet), rolling_out(backbone_for(tiny_pipe)):
        method = method_on(tiny_pipe)
        object.__setattr__(method, "since", 2)
        before = [part.detach().clone() for part in method.generator.parameters()]
        turns = method.turns(Descent(lr=1e-2), Descent(lr=1e-2))
        assert not method.prepare(1, Share(0, 1)).images.requires_grad
        Trainer(turns=turns, prepare=method.prepare, steps=2, seed=0).train(lambda _share: None)
        assert all(map(torch.equal, before, method.generator.parameters()))
        Trainer(turns=turns, prepare=method.prepare, steps=3, seed=0).train(lambda _share: None)
        assert not any(map(torch.equal, before, method.generator.parameters()))


@pytest.mark.parametrize("other", [False, True], ids=["the frozen network", "another generator"])
def test_in_the_head_start_the_generator_copies_a_first_one(other: bool, pipe: Any) -> None:
    """From the same noise, asked about the teacher's prompt; afterwards its loss is that of the method."""
    method = method_on(pipe)
    first = method_on(pipe).fake if other else None
    for name, value in {"since": 2, "copying": True, "first": first}.items():
        object.__setattr__(method, name, value)
    backbone, source = method.source.backbone, method.source
    drawn = method.prepare(1, Share(0, 1))
    assert drawn.teachers != drawn.prompts
    found = method.losses(drawn)
    noise = backbone.noise(seeds(method, drawn))
    with torch.no_grad(), nullcontext() if first is None else first.active():
        wanted = one_step(backbone, noise, LEVEL, source.prompts(drawn.teachers))
    torch.testing.assert_close(found, {"copied_forget": (drawn.images - wanted).square().mean()})
    before = found["copied_forget"].item()
    turns = method.turns(Descent(lr=1e-2), Descent(lr=1e-2))
    row = Trainer(turns=turns, prepare=method.prepare, steps=2, seed=0).train(lambda _share: None)
    assert set(row) == {"fake_forget", "copied_forget"}
    assert method.losses(method.prepare(1, Share(0, 1)))["copied_forget"] < before
    assert set(method.losses(method.prepare(2, Share(0, 1)))) == {"forget"}


def test_both_players_share_one_copy_of_the_network(tiny_pipe: Any) -> None:
    """Three networks in one: no second UNet, and no more bytes of parameters than its own and both LoRAs."""
    unet, seen = tiny_pipe.unet, []

    def alive() -> tuple[int, int]:
        kinds = [thing for thing in gc.get_objects() if isinstance(thing, type(unet))]
        return len(kinds), sum(p.nbytes for each in kinds for p in each.parameters())

    gc.collect()
    before = alive()
    with scopes.frozen(unet), rolling_out(backbone_for(tiny_pipe)):
        method = method_on(tiny_pipe)
        turns = method.turns(Descent(lr=1e-2), Descent(lr=1e-2))
        Trainer(
            turns=turns, prepare=method.prepare, steps=2, seed=0, before=lambda _update: seen.append(alive())
        ).train(lambda _share: None)  # fmt: skip
    assert set(seen) == {before}


def test_a_source_gives_noised_images_and_what_the_model_says(tiny_pipe: Any) -> None:
    backbone = backbone_for(tiny_pipe)
    with torch.no_grad():
        method = method_on(tiny_pipe)
        source = method.source
        index = torch.tensor([5, source.per_scene + 7])
        states = source.take(index)
        assert states.scene.tolist() == [0, 1]
        assert all(LEVELS[0] <= t < LEVELS[1] for t in states.t.tolist())
        told = source.prompts([scene.asks[0] for scene in SCENES])
        torch.testing.assert_close(states.asked[:, 0], backbone.predict(states.x, states.t, told))
        again = source.take(index.flip(0))
        torch.testing.assert_close(again.x.flip(0), states.x)
        noise = backbone.noise([0])
        stock = one_step(backbone, noise, LEVEL, source.prompts(["a house"]))
        with source.student.active():
            assert not torch.equal(stock, one_step(backbone, noise, LEVEL, source.prompts(["a house"])))
