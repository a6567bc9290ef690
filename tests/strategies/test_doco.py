"""DoCo's two players against plain arithmetic, what its presets pin, and what is warned of."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

import erasure
from erasure import Concept
from erasure.backbones import backbone_for
from erasure.errors import OptionError
from erasure.strategies import get
from erasure.training.discriminator import (
    PATIENCE,
    Discriminator,
    DiscriminatorMonitor,
    DiscriminatorWarning,
    looks_like,
)
from erasure.training.loop import Learner, Share, Trainer
from erasure.training.run import Run
from erasure.training.trajectories import rolling_out
from tests.strategies.test_concept_ablation import QUICK, predicted, trained

CAT = Concept("cat", anchor="dog")
NOW: dict[str, Any] = {"head_start": 0.0}


# Discriminator -------------------------------------------------------------------------------------------------------


def released_network(channels: int) -> nn.Sequential:
    """Its layers as the paper's code counts them: 4 x 4, stride 2, to 64, 128, 256 and 512 channels, and to one."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, width in itertools.pairwise((64, 128, 256, 512)):
        layers += [nn.Conv2d(before, width, 4, 2, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))


def test_the_released_discriminator_is_that_network() -> None:
    judge, plain = Discriminator(4, (64, 64), norm="batch", told_level=False, seed=3), released_network(4)
    own = [
        *itertools.chain(*((layer, norm) for layer, norm in zip(judge.layers, judge.norms, strict=True))),
        judge.last,
    ]
    theirs = [part for part in plain if not isinstance(part, nn.LeakyReLU)]
    for ours, copy in zip((part for part in own if not isinstance(part, nn.Identity)), theirs, strict=True):
        copy.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    found = judge.judge(x, torch.tensor([1, 500, 999]))
    assert found.shape == (3, 1, 3, 3)
    torch.testing.assert_close(found, plain(x))
    assert sum(p.numel() for p in judge.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (16, 8), (16, 16), (32, 48), (64, 64)], ids=str)
def test_latents_of_any_size_are_judged_row_by_row(size: tuple[int, int]) -> None:
    judge = Discriminator(16, size)
    x = torch.randn(3, 16, *size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10.0, 500.0, 999.0])
    found = judge.judge(x, t)
    torch.testing.assert_close(found[1:2], judge.judge(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1:2], judge.judge(x[1:2], t[2:]))
    found.mean().backward()
    assert all(p.grad is not None for p in judge.parameters())


def test_weights_follow_from_the_seed_and_leave_the_caller_s_random_state() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (Discriminator(4, (8, 8), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.last.weight, again.last.weight)
    assert not torch.equal(first.last.weight, other.last.weight)


# Updates -------------------------------------------------------------------------------------------------------------


def x0(pipe: Any, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
    kept = pipe.scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
    return (x - (1 - kept).sqrt() * prediction) / kept.sqrt()


def players(pipe: Any, **options: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    strategy, task, batch = trained(pipe, "doco", **{**NOW, **options})
    return strategy, task, batch, {turn.name: turn for turn in strategy.turns(task, ())}


def terms_of(pipe: Any, task: Any, batch: Any, judge: Discriminator) -> dict[str, Tensor]:
    """The losses of an update, of one pass for each row of each prompt."""
    states = batch.concept
    rows = list(zip(batch.x, batch.t, batch.guidance, batch.prompts, strict=True))
    with torch.no_grad():
        anchor = torch.stack([predicted(pipe, x, t, "dog", g) for x, t, g, _ in rows[:3]])
        kept = torch.stack([predicted(pipe, x, t, prompt, g) for x, t, g, prompt in rows[3:]])
    with task.student.active():
        made = torch.stack([predicted(pipe, x, t, prompt, g) for x, t, g, prompt in rows])
    drawn = x0(pipe, made[:3], states.x, states.t)
    real = judge.judge(x0(pipe, anchor, states.x, states.t), states.t)
    return {
        "anchor_judged": F.softplus(real).mean(),
        "concept_judged": F.softplus(-judge.judge(drawn.detach(), states.t)).mean(),
        "fooling": F.softplus(judge.judge(drawn.detach(), states.t)).mean(),
        "erase": F.softplus(judge.judge(drawn, states.t)).mean(),
        "retain": 2.0 * (made[3:] - kept).square().mean(),
    }


def given(turn: Any, batch: Any) -> list[Tensor]:
    """The gradient that an optimiser is given in an update."""
    return stepped(Trainer(turns=[turn], prepare=lambda _update, _share: batch, steps=1, seed=0))


def stepped(trainer: Trainer[Any]) -> list[Tensor]:
    """The gradient that the only optimiser of a training is given in its first update."""
    (learner,) = trainer.learners
    found: list[Tensor] = []
    learner.optimiser.step = lambda: found.extend(p.grad.clone() for p in learner.parameters)  # type: ignore
    trainer.update(0)
    return found


def unclipped(gradient: list[Tensor], most: float = 1.0) -> list[Tensor]:
    norm = torch.cat([part.flatten() for part in gradient]).norm()
    return [part * min(1.0, most / float(norm)) for part in gradient]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("fooling", [False, True])
def test_an_update_of_the_discriminator_is_plain_arithmetic(tiny_pipe_original: Any, fooling: bool) -> None:
    _, task, batch, turns = players(tiny_pipe_original, retain_weight=2.0, fooling_teaches=fooling)
    judge = turns["discriminator"].player
    terms = terms_of(tiny_pipe_original, task, batch, judge)
    names = ("anchor_judged", "concept_judged", *(("fooling",) if fooling else ()))
    loss = torch.stack([terms[name] for name in names]).sum()
    close(given(turns["discriminator"], batch), list(torch.autograd.grad(loss, list(judge.parameters()))))


@pytest.mark.parametrize("form", ["pcgrad", "released", "none"])
def test_an_update_of_the_student_is_plain_arithmetic(tiny_pipe_original: Any, form: str) -> None:
    """Of a, the gradient of fooling, and b, that of what must survive, tensor by tensor where a b < 0:

    PCGrad a - (a b / |b|^2) b; the released code, of either at norm 1 at most, a - (a b / |a| |b|) b / |b|.
    """
    options = {"surgery": form, "retain_added": 0.0, "clip": 0.0, "retain_weight": 2.0}
    _, task, batch, turns = players(tiny_pipe_original, **options)
    terms = terms_of(tiny_pipe_original, task, batch, turns["discriminator"].player)
    parameters = list(task.student.parameters())
    first, second = (
        list(torch.autograd.grad(terms[name], parameters, retain_graph=True)) for name in ("erase", "retain")
    )
    wanted, opposed = [], 0
    if form == "released":
        first, second = unclipped(first), unclipped(second)
    for a, b in zip(first, second, strict=True):
        dot = (a * b).sum()
        if form == "none":
            wanted.append(a + b)
        elif dot < 0:
            opposed += 1
            scale = b.norm() ** 2 if form == "pcgrad" else a.norm() * b.norm() ** 2
            wanted.append(a - dot / scale * b)
        else:
            wanted.append(a)
    assert opposed or form == "none"
    close(given(turns["student"], batch), wanted)


@pytest.mark.parametrize("form", ["pcgrad", "none"])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(tiny_pipe_original: Any, form: str) -> None:
    """Of a student that differs from the stock model: of one that does not, what surgery projects on is rounding."""
    options = {"batch": 4, "retain_batch": 4, "surgery": form}
    strategy, task, _, turns = players(tiny_pipe_original, **options)
    for turn in turns.values():
        found = []
        for parts in (1, 2):
            trainer = Trainer(
                turns=[turn], prepare=partial(strategy.prepare, task), steps=1, seed=0, accumulation=parts
            )
            with rolling_out(task.backbone):
                found.append(stepped(trainer))
        whole, split = (torch.cat([part.flatten() for part in gradient]) for gradient in found)
        assert float((whole - split).norm() / whole.norm()) < 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"first_turn": "student", "discriminator_norm": "batch"}], ids=["ours", "code"]
)
def test_a_training_that_is_stopped_again_and_again_ends_with_the_same_bits(
    options: dict[str, Any], tiny_pipe_original: Any, tmp_path: Path
) -> None:
    """While the discriminator learns alone, in the student's first update, and later."""

    def make(run: Run | None, progress: Any = False) -> erasure.Erasure:
        return erasure.erase(
            tiny_pipe_original, CAT, "doco", attach=False, progress=progress, run=run, steps=5, head_start=0.4,
            lr=1e-2, **QUICK, **options,
        )  # fmt: skip

    whole, run = make(None), Run(checkpoints=tmp_path, save_every=1)
    for last in (1, 3, 4):

        def stop(share: float, last: int = last) -> None:
            if share >= last / 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(run, stop)
    resumed = make(run)
    found, wanted = (made.edits.lora_state_dict() for made in (resumed, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    costs = [made.config.cost for made in (resumed, whole)]
    assert len({cost["denoiser_forwards"] - cost["rollout_forwards"] for cost in costs}) == 1
    for figure in ("discriminator_right", "discriminator_certain"):
        assert costs[0][figure] == costs[1][figure], figure


def test_both_turns_share_one_pass_of_the_student(tiny_pipe_original: Any) -> None:
    def cost(**options: Any) -> float:
        made = erasure.erase(
            tiny_pipe_original, CAT, "doco", attach=False, progress=False, steps=4, **{**QUICK, **options}
        )  # fmt: skip
        return made.config.cost["denoiser_forwards"] - made.config.cost["rollout_forwards"]

    # 3 rows of the concept and 2 retained: forward once and backward twice as much, but once alone without either.
    assert cost(head_start=0.5) == 2 * 3 + 2 * 3 * (3 + 2)
    assert cost(head_start=0.0, first_turn="student") == 4 * 3 * (3 + 2)
    assert cost(head_start=0.0, states="images") == 4 * (3 * (3 + 2) + (3 + 2))
    assert cost(head_start=0.0, retain_batch=0) == 4 * 3 * 3


def test_a_whole_run_takes_a_tenth_of_the_released_recipe_s_passes_at_most(tiny_pipe_original: Any) -> None:
    """1000 images of 25 steps with guidance; 1000 updates of 16 student and 8 teacher rows, in the others besides two
    backward passes of all 16 rows (a backward pass counts as two)."""
    released = 1000 * 25 * 2 + 1000 * (16 + 8) + 1000 * (16 + 8 + 2 * 2 * 16)
    assert released == 162_000
    strategy: Any = get("doco").configured()
    backbone = backbone_for(tiny_pipe_original)
    task = strategy.task(backbone, backbone.reader, [CAT], 0, Accelerator(cpu=True))
    images = sum(source.trajectories for source in task.sources())
    rows = strategy.batch + strategy.retain_batch
    ours = 2 * strategy.rollout_steps * images + strategy.since * strategy.batch
    ours += (strategy.steps - strategy.since) * 3 * rows  # as the passes that both turns share show
    assert 10 * ours <= released
    # Of each state that the student learns from.
    assert 2 * ours / ((strategy.steps - strategy.since) * rows) <= released / (1000 * 16)


def test_a_discriminator_learns_alone_first(tiny_pipe_original: Any) -> None:
    released, short = (get("doco").configured("released", **options) for options in ({}, {"steps": 20}))
    assert (released.since, released.steps - released.since) == (1001, 999)  # type: ignore[attr-defined]
    strategy, task, batch, turns = players(tiny_pipe_original, head_start=0.5, steps=4)
    assert not strategy.drawn(task, batch).requires_grad
    with rolling_out(task.backbone):
        later = strategy.prepare(task, 2, Share(0, 1))
    assert strategy.drawn(task, later).requires_grad
    assert [turns["student"].is_due(update) for update in range(4)] == [False, False, True, True]
    assert all(turns["discriminator"].is_due(update) for update in range(4))
    assert short.since == 10  # type: ignore[attr-defined]


def test_the_discriminator_s_optimiser(tiny_pipe_original: Any) -> None:
    for preset, lr in (("paper", 1e-4), ("released", 1e-4), ("released-style", 5e-4)):
        strategy: Any = get("doco").configured(preset, **{**QUICK, "rollouts": 1})
        _, task, _, _ = players(tiny_pipe_original)
        learner = Learner({turn.name: turn for turn in strategy.turns(task, ())}["discriminator"], strategy.steps)
        (group,) = learner.optimiser.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (lr, (0.5, 0.999), 0.0)


# Warnings and refusals -----------------------------------------------------------------------------------------------


def watched(losses: list[float], right: float, since: int, judge: Discriminator | None = None) -> Discriminator:
    judge = judge or Discriminator(4, (8, 8))
    watch = DiscriminatorMonitor(judge, since)
    for update, loss in enumerate(losses):
        judge.judged.append((loss, right))
        watch.apply(update, 1e-3)
    return judge


def test_a_discriminator_that_collapses_is_warned_of_once() -> None:
    with pytest.warns(DiscriminatorWarning, match=r"erred nowhere in the last 50 updates") as found:
        judge = watched([0.0] * (PATIENCE + 40), 1.0, since=10)
    assert len(found) == 1
    assert DiscriminatorMonitor(judge, 0).figures() == {
        "discriminator_right": pytest.approx(1.0, abs=1e-3),
        "discriminator_certain": 80,
    }


def test_a_discriminator_that_errs_now_and_then_is_not(recwarn: pytest.WarningsRecorder) -> None:
    watched(([0.0] * (PATIENCE - 1) + [0.5]) * 3, 1.0, since=0)
    watched([0.0] * 3 * PATIENCE, 1.0, since=3 * PATIENCE)  # alone it may be as certain as it likes
    assert not recwarn


def test_a_training_that_goes_on_warns_where_one_without_a_break_does() -> None:
    first, second = watched([0.0] * 30, 1.0, since=0), Discriminator(4, (8, 8), seed=1)
    second.load_state_dict(first.state_dict())
    with pytest.warns(DiscriminatorWarning, match="collapsed"):
        watched([0.0] * (PATIENCE - 30), 1.0, since=0, judge=second)


def test_a_discriminator_that_learned_nothing_alone_is_warned_of() -> None:
    with pytest.warns(DiscriminatorWarning, match=r"after 60 updates alone .* in 50% of cases"):
        watched([0.69] * 70, 0.5, since=60)


def test_a_training_says_how_its_discriminator_ended(tiny_pipe_original: Any) -> None:
    made = erasure.erase(tiny_pipe_original, CAT, "doco", attach=False, progress=False, steps=2, **QUICK, **NOW)
    cost = made.config.cost
    assert 0 <= cost["discriminator_right"] <= 1
    assert cost["discriminator_certain"] == 0
    assert {"loss_anchor_judged", "loss_concept_judged", "loss_erase", "loss_retain"} <= set(cost)


def test_what_cannot_be_is_refused(tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match=r"'head_start' is 0.99; allowed: less: the student would never learn"):
        get("doco").configured(head_start=0.99, steps=3)
    with pytest.raises(OptionError, match="'discriminator' where 'accumulation' is above 1"):
        get("doco").configured(first_turn="student", accumulation=2, batch=2)
    options = {**QUICK, "batch": 2, "accumulation": 2, "discriminator_norm": "batch"}
    with pytest.raises(OptionError, match="'group' where a batch is computed in several parts"):
        erasure.erase(tiny_pipe_original, CAT, "doco", attach=False, progress=False, steps=2, **options)


def test_a_judgement_is_a_cross_entropy() -> None:
    logits = torch.linspace(-3, 3, 7)
    for kind in (0.0, 1.0):
        wanted = -(kind * logits.sigmoid().log() + (1 - kind) * (-logits).sigmoid().log()).mean()
        torch.testing.assert_close(looks_like(logits, kind), wanted)
