"""Several players in one loop, against loops of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.errors import DivergenceError
from erasure.training.combining import Surgery
from erasure.training.loop import Share, Trainer
from erasure.training.run import Run
from erasure.training.states import stable_seed
from erasure.training.turns import Descent, Player, Turn

STEPS = 12


class Linear(Player):
    """A player with a layer of its own."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(inputs, outputs)


class Match:
    """A generator that learns to look like something to a discriminator, which learns to tell them apart."""

    def __init__(self, run: Run | None = None, *, kill_at: int | None = None, accumulation: int = 1, **options: Any):
        self.generator, self.judge = Linear(4, 3, seed=0), Linear(3, 1, seed=1)
        self.kill_at, self.prepared = kill_at, 0
        student: dict[str, Any] = {
            "losses": self.fooled, "descent": Descent(lr=0.02, ema=0.9, weight_decay=0.1, clip=1.0), "since": 3
        }  # fmt: skip
        self.turns = [
            Turn(name="judge", player=self.judge, losses=self.judged, descent=Descent(lr=0.05, betas=(0.5, 0.999))),
            Turn(name="student", player=self.generator, **{**student, **options}),
        ]
        self.trainer = Trainer(
            turns=self.turns, prepare=self.prepare, steps=STEPS, seed=0, run=run or Run(), accumulation=accumulation
        )

    def prepare(self, update: int, share: Share) -> tuple[Tensor, Tensor]:
        if update == self.kill_at:
            raise KeyboardInterrupt
        self.prepared += 1
        noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(stable_seed(0, update)))
        return share.of(noise), share.of(noise[:, :3] + 2)

    def judged(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        made = self.generator.layer(batch[0]).detach()
        return {"real": logistic(self.judge.layer(batch[1]), 1), "made": logistic(self.judge.layer(made), 0)}

    def fooled(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        made = self.generator.layer(batch[0])
        return {"fool": logistic(self.judge.layer(made), 1), "near": 0.1 * F.mse_loss(made, batch[0][:, :3])}

    def train(self) -> list[Tensor]:
        self.row = self.trainer.train(lambda share: None)
        return self.values()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for player in (self.generator, self.judge) for p in player.parameters()]


def logistic(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_players_are_two_optimisers() -> None:
    match = Match(descent=Descent(lr=0.02))
    found = match.train()
    plain = Match()
    judge = torch.optim.AdamW(plain.judge.parameters(), lr=0.05, betas=(0.5, 0.999), weight_decay=0.0)
    generator = torch.optim.AdamW(plain.generator.parameters(), lr=0.02, weight_decay=0.0)
    for update in range(STEPS):
        batch = plain.prepare(update, Share(0, 1))
        for optimiser, losses in ((judge, plain.judged), (generator, plain.fooled)):
            if optimiser is generator and update < 3:
                continue
            optimiser.zero_grad()
            torch.stack(list(losses(batch).values())).sum().backward()
            optimiser.step()
    assert equal(found, plain.values())
    assert set(match.row) == {"real", "made", "fool", "near"}


def test_a_turn_gives_the_other_player_no_gradient() -> None:
    match = Match(since=0)
    match.trainer.update(0)
    assert all(p.grad is None for player in (match.generator, match.judge) for p in player.parameters())
    before = match.values()
    match.trainer.turns = match.turns[:1]
    match.trainer.learners = match.trainer.learners[:1]
    match.trainer.update(1)
    assert equal(match.values()[:2], before[:2])
    assert not equal(match.values()[2:], before[2:])


def test_turns_begin_late_and_come_every_so_often() -> None:
    taken: list[int] = []
    match = Match(since=2, every=3)
    step = match.trainer.learners[1].optimiser.step
    match.trainer.before = lambda update: setattr(match, "at", update)
    match.trainer.learners[1].optimiser.step = lambda: (taken.append(match.at), step())  # type: ignore[method-assign]
    match.train()
    assert taken == [2, 5, 8, 11]


@pytest.mark.parametrize("kill_at", [1, 4, 11])
def test_a_killed_match_ends_with_the_same_bits(tmp_path: Path, kill_at: int) -> None:
    whole = Match().train()
    run = Run(checkpoints=str(tmp_path), save_every=2)
    with pytest.raises(KeyboardInterrupt):
        Match(run, kill_at=kill_at).train()
    assert equal(Match(run).train(), whole)


def test_turns_of_an_update_share_what_was_prepared() -> None:
    match = Match(since=0)
    match.train()
    assert match.prepared == STEPS


def test_parts_of_a_batch_add_up_for_all_players() -> None:
    whole, parts = Match(), Match(accumulation=4)
    for a, b in zip(whole.train(), parts.train(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # One part at a time is in memory, so each is prepared for every player.
    assert parts.prepared == 4 * (STEPS + STEPS - 3)


def test_surgery_takes_two_gradients_of_one_forward() -> None:
    match = Match(since=0, combine=Surgery(("near",), form="pcgrad"), descent=Descent(lr=0.02))
    runs: list[int] = []
    match.generator.register_forward_hook(lambda *_: runs.append(1))
    parameters = list(match.generator.parameters())
    batch = Match().prepare(0, Share(0, 1))
    match.trainer.turns, match.trainer.learners = match.turns[1:], match.trainer.learners[1:]
    terms = match.fooled(batch)
    first, second = (torch.autograd.grad(terms[name], parameters, retain_graph=True) for name in ("fool", "near"))
    wanted = [a - min(float((a * b).sum()), 0.0) / (b * b).sum() * b for a, b in zip(first, second, strict=True)]
    given: list[Tensor] = []
    learner = match.trainer.learners[0]
    learner.optimiser.step = lambda: given.extend(p.grad.clone() for p in parameters)  # type: ignore[method-assign,union-attr]
    match.trainer.update(0)
    assert len(runs) == 1
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_message_names_the_rate_of_the_player_that_diverged() -> None:
    match = Match(rate="student_lr", losses=lambda batch: {"fool": match.generator.layer(batch[0]).sum() * torch.nan})
    with pytest.raises(DivergenceError, match=r"'fool' is nan at step 3 of 12: lower student_lr \(now 0.02\)"):
        match.train()
