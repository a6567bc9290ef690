"""Training finds known directions, resumes exactly, revives dead latents, and stops on NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from erasure.errors import DivergenceError, OptionError
from erasure.sae import SAEConfig, SAETrainer, SparseAutoencoder, TrainingOptions
from erasure.sae.training import TrainingLoss, keep_largest

WIDTH, TRUE = 24, 32


def directions() -> torch.Tensor:
    return F.normalize(torch.randn(TRUE, WIDTH, generator=torch.Generator().manual_seed(99)), dim=1)


def sparse_world(step: int) -> torch.Tensor:
    """Sums of 3 of 32 known directions, with an offset."""
    generator = torch.Generator().manual_seed(step)
    chosen = torch.rand(256, TRUE, generator=generator).argsort(1)[:, :3]
    strength = torch.zeros(256, TRUE).scatter_(1, chosen, 1 + torch.rand(256, 3, generator=generator))
    return 5 * strength @ directions() + 2


def options(**changes: object) -> TrainingOptions:
    given = {"d_sae": 64, "k": 3, "steps": 600, "learning_rate": 3e-3, "dead_after": 5000, "save_every": 50}
    return TrainingOptions(**{**given, **changes})


@pytest.mark.parametrize("batch_topk", [True, False])
def test_finds_the_directions_that_made_the_data(batch_topk: bool) -> None:
    sae = SAETrainer(sparse_world, options(batch_topk=batch_topk)).train()
    x = sparse_world(10_000)
    fvu = float((x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    found = (directions() @ sae.W_dec.T).max(1).values
    assert fvu < 0.12
    assert (found > 0.95).float().mean() > 0.8
    fired = (sae.encode(x) > 0).float().sum(1).mean()
    assert 2 < fired < 4.5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = SAETrainer(sparse_world, options(steps=120)).train()

    class Stop(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0.7:
            raise Stop

    with pytest.raises(Stop):
        SAETrainer(sparse_world, options(steps=120), folder=tmp_path).train(stop)
    resumed = SAETrainer(sparse_world, options(steps=120), folder=tmp_path)
    asked: list[int] = []
    resumed.stream = lambda step: (asked.append(step), sparse_world(step))[1]
    sae = resumed.train()
    assert asked[0] == 50
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), sae.state_dict().values(), strict=True))


def random_loss(**changes: object) -> TrainingLoss:
    chosen = options(**changes)
    sae = SparseAutoencoder(SAEConfig(d_in=WIDTH, d_sae=64, k=3))
    sae.initialise(sparse_world(0), torch.Generator().manual_seed(0))
    return TrainingLoss(sae, chosen)


def test_dead_latents_learn_the_error_with_its_right_sign() -> None:
    """What they reconstruct is target minus reconstruction: a dead latent along the error lowers the loss."""
    losses = random_loss(aux_k=1)
    error = torch.randn(1, WIDTH).repeat(8, 1) + 0.01 * torch.randn(8, WIDTH)
    losses.silent[7] = 10**6
    before = torch.full((8, 64), 5.0)
    along = F.normalize(error.mean(0), dim=0)
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            losses.sae.W_dec[7] = sign * along
        values.append(losses.dead_loss(before, error).item())
    assert values[0] < values[1]


def test_no_dead_latents_no_loss_and_only_dead_ones_get_its_gradient() -> None:
    losses = random_loss()
    before = torch.randn(8, 64, requires_grad=True)
    error = torch.randn(8, WIDTH)
    assert float(losses.dead_loss(before, error)) == 0
    losses.silent[[3, 9]] = 10**6
    losses.dead_loss(before, error).backward()
    assert before.grad is not None
    assert set(before.grad.abs().sum(0).nonzero().flatten().tolist()) <= {3, 9}


def test_dead_is_counted_in_tokens() -> None:
    losses = random_loss()
    fired = torch.zeros(64, dtype=torch.bool)
    fired[5] = True
    for _ in range(3):
        losses.count(fired, 2000, torch.tensor(1.0))
    assert losses.silent[5] == 0
    assert (losses.silent[:5] == 6000).all()


def test_the_fvu_is_measured_against_the_activations_with_their_offset() -> None:
    losses = random_loss()
    x = sparse_world(3)
    values, indices, _ = keep_largest(losses.sae.pre_activations(x), 3, batch=True)
    dense = torch.zeros(len(x), 64)
    flat = losses.sae.pre_activations(x)
    limit = values.min()
    dense = torch.where(flat >= limit, flat.relu(), dense)
    rebuilt = dense @ losses.sae.W_dec + losses.sae.b_dec
    expected = (x - rebuilt).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    torch.testing.assert_close(losses(x).fvu, expected.detach(), atol=1e-5, rtol=1e-5)
    assert len(indices) == 3 * len(x)


def test_nan_stops_with_the_step() -> None:
    def broken(step: int) -> torch.Tensor:
        return sparse_world(step) * (torch.nan if step == 4 else 1.0)

    with pytest.raises(DivergenceError, match="step 4"):
        SAETrainer(broken, options()).train()


def test_impossible_options_are_refused() -> None:
    with pytest.raises(OptionError, match="steps"):
        TrainingOptions(steps=0)
