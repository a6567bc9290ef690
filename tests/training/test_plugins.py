"""Projection and pruning against plain arithmetic, and against the projected gradient that leaks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erasure.training.plugins import (
    ErasabilityWarning,
    GroupLasso,
    InputGrams,
    RetainProjection,
    group_of,
    null_space,
)
from erasure.training.student import LowRankStudent, Student, SubsetStudent


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16)).requires_grad_(False)


@pytest.fixture
def retained() -> Tensor:
    return torch.randn(10, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def concept() -> Tensor:
    return torch.randn(1, 24, generator=torch.Generator().manual_seed(2))


def gram(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


def test_the_null_space_by_least_squares(retained: Tensor) -> None:
    """I - C (C^T C)^-1 C^T, with the retained inputs as columns of C."""
    c = retained.double().T
    wanted = torch.eye(24, dtype=torch.float64) - c @ torch.linalg.inv(c.T @ c) @ c.T
    torch.testing.assert_close(null_space(gram(retained), 1.0), wanted, rtol=1e-9, atol=1e-9)


def test_a_share_of_the_energy_protects_the_leading_directions() -> None:
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert null_space(gram(rows), 0.9).diagonal().tolist() == pytest.approx([0, 0, 1, 1])  # 9 + 4 of 14
    assert null_space(gram(rows), 0.5).diagonal().tolist() == pytest.approx([0, 1, 1, 1])
    assert null_space(gram(rows), 1.0).diagonal().tolist() == pytest.approx([0, 0, 0, 1])


def test_grams_are_of_the_inputs(retained: Tensor) -> None:
    net, grams = network(), InputGrams()
    with grams.gathering(net, ["0"]):
        net(retained[:4].view(2, 2, 24))
        net(retained[4:])
    net(retained)
    torch.testing.assert_close(grams.grams["0"], gram(retained))


def train(
    student: Student, projection: RetainProjection | None, concept: Tensor, *, project_gradient: Any = None
) -> None:
    """AdamW with weight decay, towards another output for the concept and, by chance, everywhere else."""
    generator = torch.Generator().manual_seed(3)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.1)
    if projection is not None:
        projection.project()
    for _ in range(60):
        x = concept + 0.3 * torch.randn(8, 24, generator=generator)
        loss = (student(lambda x=x: student.network(x)) - 5).square().mean()
        optimiser.zero_grad()
        loss.backward()
        if project_gradient is not None:
            for parameter in student.parameters():
                assert parameter.grad is not None
                parameter.grad.copy_(parameter.grad.double() @ project_gradient)
        optimiser.step()
        if projection is not None:
            projection.project()


@pytest.mark.parametrize("kind", ["low rank", "subset"])
def test_retained_outputs_stay_and_with_a_projected_gradient_they_do_not(
    kind: str, retained: Tensor, concept: Tensor
) -> None:
    net = network()
    space = null_space(gram(retained), 1.0)

    def make() -> Student:
        if kind == "subset":
            return SubsetStudent(net, ["0.weight"])
        return LowRankStudent(net, ["0"], 4, torch.Generator().manual_seed(0))

    stock, before = net(retained), net(concept)
    student = make()
    train(student, RetainProjection(student, {"0": space}), concept)
    drift = (student(lambda: net(retained)) - stock).abs().max() / stock.abs().max()
    assert drift < 1e-5
    assert (student(lambda: net(concept)) - before).abs().max() > 1

    leaking = SubsetStudent(net, ["0.weight"])
    train(leaking, None, concept, project_gradient=space)
    leak = (leaking(lambda: net(retained)) - stock).abs().max() / stock.abs().max()
    assert leak > 1e-2


def test_erasability_is_what_is_free_of_the_concept(retained: Tensor, concept: Tensor) -> None:
    student = SubsetStudent(network(), ["0.weight"])
    space = null_space(gram(retained), 1.0)
    projection = RetainProjection(student, {"0": space})
    wanted = float((concept.double() @ space).norm() / concept.double().norm())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert projection.erasability({"0": gram(concept)}) == pytest.approx(wanted)
    inside = retained[:1] + 0.1 * concept
    with pytest.warns(ErasabilityWarning, match="free to change"):
        projection.erasability({"0": gram(inside)})


def lasso_student() -> LowRankStudent:
    net = nn.ModuleDict(
        {"attn1": nn.ModuleDict({"to_q": nn.Linear(6, 6), "to_k": nn.Linear(6, 6)}), "attn2": nn.Linear(6, 6)}
    ).requires_grad_(False)
    student = LowRankStudent(net, ["attn1.to_q", "attn1.to_k", "attn2"], 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for up in student.up:
            up.fill_(0.2)
    return student


def test_the_proximal_step_by_hand() -> None:
    student = lasso_student()
    lasso = GroupLasso(student, alpha=2.0)
    before = [tensor.clone() for tensor in (*student.down[:2], *student.up[:2])]
    norm = torch.cat([tensor.flatten() for tensor in before]).norm()
    lasso.apply(0, lr=0.1)
    factor = max(0.0, 1 - 0.1 * 2.0 / norm.item())
    for tensor, was in zip((*student.down[:2], *student.up[:2]), before, strict=True):
        torch.testing.assert_close(tensor, was * factor)
    assert lasso.dropped() == 0


def test_groups_reach_zero_exactly_and_leave_the_result() -> None:
    student = lasso_student()
    with torch.no_grad():
        student.down[2].mul_(0.01)
        student.up[2].mul_(0.01)
    lasso = GroupLasso(student, alpha=1.0)
    for _ in range(3):
        lasso.apply(0, lr=0.1)
    assert lasso.dropped() == 1
    assert set(student.low_rank()) == {"attn1.to_q", "attn1.to_k"}


def test_pruning_sets_in_late() -> None:
    student = lasso_student()
    lasso, before = GroupLasso(student, alpha=2.0, since=3), student.up[0].clone()
    lasso.apply(2, lr=0.1)
    assert torch.equal(student.up[0], before)
    lasso.apply(3, lr=0.1)
    assert student.up[0].norm() < before.norm()


def test_groups_are_attention_and_feed_forward_layers() -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert group_of(f"{block}.attn2.to_out.0") == group_of(f"{block}.attn2.to_k") == f"{block}.attn2"
    assert group_of(f"{block}.ff.net.0.proj") == f"{block}.ff"
    assert group_of("encoder.layers.3.self_attn.q_proj") == "encoder.layers.3.self_attn"
    assert group_of("encoder.layers.3.mlp.fc1") == "encoder.layers.3.mlp"
    assert group_of("time_embedding.linear_1") == "time_embedding"
