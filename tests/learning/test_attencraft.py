"""AttenCraft's updates against plain arithmetic: what is drawn, what is masked, what learns."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from erasure.backbones import backbone_for
from erasure.learning.attencraft import AttenCraft
from erasure.learning.lessons import Balance, Batch, CutOuts, PictureTraining, Places
from erasure.learning.player import LearnedTensors
from erasure.learning.tokens import beside, put_in, start_vectors

TOKENS = ["<a>", "<b>"]
PAPER = {
    "steps": 500, "lr": 1e-4, "weight_decay": 1e-2, "batch": 1, "clip": 0.0, "vectors": 1, "vectors_rate": 1.0,
    "spread": 0.0, "rank": 0, "train_start": False, "templates": False, "first_masks": "tokens", "power": 4,
    "mask_every": 20, "alone": "masked", "attention_weight": 1.0, "attention_loss": "divergence",
    "prior_weight": 1.0, "prior_batch": 1, "prior_prompt": "a photo at the beach", "prior_images": 200,
    "prior_steps": 50, "prior_target": "noise",
}  # fmt: skip
"""Settings of the authors' code."""


def test_the_paper_has_its_settings() -> None:
    assert AttenCraft.presets["paper"] == PAPER
    paper = AttenCraft.configured("paper")
    assert (paper.trained, paper.sampling, paper.margin, paper.agreement) == ("keys and values", "uniform", 0.1, 0.8)
    assert paper.together is None


@pytest.fixture(scope="module")
def lesson(session_pipe: Any) -> PictureTraining:
    """Two tokens of a tiny pipeline, with the two halves of a picture as masks."""
    backbone = backbone_for(beside(session_pipe))
    tower, generator = backbone.reader, torch.Generator().manual_seed(0)
    put_in(backbone.pipe, {tower.component: {name: start_vectors(tower, "", 2, 0.3, generator) for name in TOKENS}})
    weights, kept = AttenCraft(train_start=False).teaches(backbone, torch.Generator().manual_seed(1))
    masks = torch.zeros(1, 2, 16, 16)
    masks[:, 0, :, :8] = masks[:, 1, :, 10:] = 1
    clean = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    taught = LearnedTensors(backbone.towers, TOKENS, 10.0, weights, kept)
    return PictureTraining(
        backbone, TOKENS, clean, torch.ones(1, 1, 16, 16), Places(masks), taught, Balance(2), None, 0
    )


def batch_of(method: AttenCraft, lesson: PictureTraining, step: int = 0) -> Batch:
    return method.prepare(lesson, step, SimpleNamespace(of=lambda rows: rows))  # type: ignore[arg-type]


def test_the_loss_of_the_picture_is_that_under_the_masks(lesson: PictureTraining) -> None:
    method = AttenCraft(batch=6, attention_weight=0.0)
    batch = batch_of(method, lesson)
    with torch.no_grad(), lesson.taught.active():
        terms = method.losses(lesson, batch)
        found = lesson.backbone.predict(batch.x, batch.t, lesson.backbone.encode(batch.prompts))
    rows = []
    for row, numbers in enumerate(batch.chosen):
        inside = lesson.places.masks[0, list(numbers)].sum(0).bool()
        rows.append((found[row] - batch.target[row])[:, inside].double().square().mean())
    assert terms["picture"].item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)
    assert set(terms) == {"picture"}


def test_rows_of_one_thing_see_it_alone(lesson: PictureTraining) -> None:
    method = AttenCraft(batch=8, outside=0.2)
    masks = torch.zeros(1, 2, 16, 16)
    masks[:, :, 4:12, 4:12] = 1
    alone = CutOuts(torch.full((1, 2, 4, 16, 16), 7.0), masks)
    batch = batch_of(method, PictureTraining(**{**vars(lesson), "alone": alone}))
    whole = batch_of(method, lesson)
    for row, numbers in enumerate(batch.chosen):
        is_alone = len(numbers) == 1
        assert torch.equal(batch.x[row], whole.x[row]) != is_alone
        found = batch.weights[row, 0].unique().tolist()
        assert found == pytest.approx([0.2, 1.0] if is_alone else [0.0, 1.0])
    assert {len(numbers) for numbers in batch.chosen} == {1, 2}


def test_attention_inside_of_the_masks_costs_nothing(lesson: PictureTraining) -> None:
    method, batch = AttenCraft(batch=2), batch_of(AttenCraft(batch=2), lesson)
    chosen = [(0,), (0, 1)]
    inside = torch.zeros(2, 3, 16, 16)
    inside[0, 0, :, 8:] = inside[0, 1, :, :8] = 1
    inside[1, 0, :, 8:10] = inside[1, 1, :, :8] = inside[1, 2, :, 10:] = 1
    batch = batch._replace(chosen=chosen)
    assert method.attention(batch, [inside]).item() == pytest.approx(0, abs=1e-6)
    assert method.attention(batch, [1 - inside]).item() > 0.5


def test_uniform_sampling_shows_each_choice_as_often(lesson: PictureTraining) -> None:
    method = AttenCraft(batch=100)
    met = Counter(row for step in range(30) for row in method.chosen(lesson, step))
    assert set(met) == {(0,), (1,), (0, 1)}
    assert all(abs(count / 3000 - 1 / 3) < 0.04 for count in met.values())
    assert AttenCraft(batch=5, together=0.0).chosen(lesson, 0).count((0, 1)) == 0


def test_reweighted_sampling_shows_what_is_learned_worse(lesson: PictureTraining) -> None:
    balance = Balance(2)
    balance.losses = torch.tensor([3.0, 1.0])
    worse = PictureTraining(**{**vars(lesson), "balance": balance})
    met = Counter(
        row for step in range(30) for row in AttenCraft(batch=100, sampling="reweighted").chosen(worse, step)
    )
    assert abs(met[0,] / 3000 - 0.5) < 0.04
    assert abs(met[1,] / 3000 - 1 / 6) < 0.04


def test_running_means_are_those_of_all_processes() -> None:
    balance = Balance(2, gather=lambda met: 2 * met)
    for loss in (0.2, 0.4):
        balance.add(0, torch.tensor(loss))
    balance.apply(0, 1e-3)
    assert balance.losses.tolist() == pytest.approx([0.9 + 0.1 * 0.3, 1.0])
    balance.apply(1, 1e-3)
    assert balance.losses.tolist() == pytest.approx([0.9 + 0.1 * 0.3, 1.0])


def test_every_vector_that_is_named_and_no_other_has_a_gradient(lesson: PictureTraining) -> None:
    method = AttenCraft(batch=1, templates=False)
    batch = batch_of(method, lesson)._replace(chosen=[(1,)], prompts=["a photo of <b>"])
    terms = lesson.taught(lambda: method.losses(lesson, batch))
    offsets = lesson.taught.offsets[lesson.backbone.reader.component]
    (gradient,) = torch.autograd.grad(terms["picture"], [offsets])
    assert (gradient[2:].abs().sum(1) > 0).all()
    assert not gradient[:2].any()


def test_outside_of_its_turn_nothing_is_taught(lesson: PictureTraining) -> None:
    table = lesson.taught.tables[lesson.backbone.reader.component]
    ids = lesson.taught.ids[lesson.backbone.reader.component][None]
    before = table(ids)
    with torch.no_grad():
        lesson.taught.offsets[lesson.backbone.reader.component].add_(1.0)
    with lesson.taught.active():
        assert torch.allclose(table(ids), before + 10.0, atol=1e-4)
    assert torch.equal(table(ids), before)
    with torch.no_grad():
        lesson.taught.offsets[lesson.backbone.reader.component].zero_()


def test_the_start_token_teaches_weights_nothing_where_it_is_kept(lesson: PictureTraining) -> None:
    student = lesson.taught.weights
    assert student is not None
    layer = student.network.get_submodule(lesson.taught.kept[0])
    assert isinstance(layer, nn.Linear)
    text = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(3))
    parameters = list(student.parameters())
    for token, learns in ((0, False), (1, True)):
        with lesson.taught.active():
            said = layer(text)[:, token].sum()
        gradients = torch.autograd.grad(said, parameters, allow_unused=True) if said.requires_grad else []
        assert any(part is not None and bool(part.any()) for part in gradients) == learns
