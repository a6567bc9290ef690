"""Feature edits on a text tower's block, against plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasure.backbones import TextTower, backbone_for
from erasure.carriers.features import EditedFeatures, FeatureEdit, word_mask
from erasure.sae.stream import activations

LAYER, PATH = 1, "encoder.layers.1"
PROMPTS = ["a photo of a cat", "a dog", ""]


@pytest.fixture
def tower(tiny_pipe: Any) -> TextTower:
    return backbone_for(tiny_pipe).towers[0]


def make_edit(tower: TextTower, gate: tuple[float, ...] = (0.0, 0.0), features: int = 6, seed: int = 0) -> FeatureEdit:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return FeatureEdit(
        w_enc=draw(32, features), b_enc=draw(features), w_dec=draw(features, 32), threshold=draw(features).abs() * 0.1,
        gain=draw(features), offset=draw(features), concept=torch.arange(features) % len(gate),
        level=draw(features).abs() + 0.5, vote=torch.full((features,), len(gate) / features),
        gate=torch.tensor(gate), end=torch.tensor(tower.tokenizer.eos_token_id),
    )  # fmt: skip


def plain(edit: FeatureEdit, x: torch.Tensor, words: list[int], strength: float = 1.0) -> torch.Tensor:
    """The formulas of the module, written out in float64 for one prompt `(tokens, dim)`."""
    x = x.double()
    latents = []
    for token in x:
        before = [float(token @ edit.w_enc[:, i].double() + edit.b_enc[i]) for i in range(len(edit.b_enc))]
        latents.append([value if value > max(float(edit.threshold[i]), 0) else 0.0 for i, value in enumerate(before)])
    result = x.clone()
    for concept, gate in enumerate(edit.gate.tolist()):
        mine = [i for i in range(len(edit.b_enc)) if edit.concept[i] == concept]
        present = [
            sum(float(edit.vote[i]) * min(latents[t][i] / float(edit.level[i]), 1) for i in mine) for t in words
        ]
        if max(present) < gate:
            continue
        for t in range(1, len(x)):
            for i in mine:
                change = float(edit.gain[i]) * latents[t][i] + float(edit.offset[i]) * (latents[t][i] > 0)
                result[t] += strength * change * edit.w_dec[i].double()
    return result


@torch.no_grad()
@pytest.mark.parametrize("gate", [(0.0, 0.0), (0.5, 2.0), (2.0, 0.4)])
def test_equals_the_formulas(tower: TextTower, gate: tuple[float, float]) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock = activations(tower, LAYER, tokens)
    edit = make_edit(tower, gate)
    EditedFeatures.write(tower.module, {PATH: [(0.7, edit)]})
    found = activations(tower, LAYER, tokens)
    for row, length in enumerate(tokens.lengths):
        expected = plain(edit, stock[row], list(range(1, length)), 0.7)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_closed_gate_changes_no_bit_and_does_not_ask_the_neighbours(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock = tower.encode(tokens)
    scores = make_edit(tower).scores(make_edit(tower).latents(activations(tower, LAYER, tokens)), word_mask(
        tokens.ids, torch.tensor(tower.tokenizer.eos_token_id)))  # fmt: skip
    first, second = scores[:2, 0].tolist()
    assert first != second
    gate = (first + second) / 2
    EditedFeatures.write(tower.module, {PATH: [(1.0, make_edit(tower, (gate, 9.0)))]})
    together = tower.encode(tokens)
    changed = [not torch.equal(a, b) for a, b in zip(together[:2], stock[:2], strict=True)]
    assert changed == [first > gate, second > gate]
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(tower.encode(tower.tokenize([prompt]))[0], together[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_score_does_not_depend_on_padding(tower: TextTower) -> None:
    edit = make_edit(tower)
    long = tower.tokenize(["a photo of a cat"])
    short = long.ids[:, : long.lengths[0]]
    scores = []
    for ids in (long.ids, short):
        states = tower.module(ids, output_hidden_states=True).hidden_states[LAYER + 1]
        scores.append(edit.scores(edit.latents(states), word_mask(ids, edit.end)))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


def test_words_and_the_first_end_are_looked_at() -> None:
    ids = torch.tensor([[7, 1, 2, 9, 9, 9], [7, 9, 9, 9, 9, 9], [7, 1, 2, 3, 4, 5]])
    assert word_mask(ids, torch.tensor(9)).long().tolist() == [
        [0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1],
    ]  # fmt: skip


def test_gradients_equal_finite_differences(tower: TextTower) -> None:
    edit = FeatureEdit(*(t.double() if t.is_floating_point() else t for t in make_edit(tower)))
    words = torch.ones(1, 4, dtype=torch.bool)
    x = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: value + edit.delta(value, words)[0], (x,))


def test_an_attack_sees_through_the_hook(tower: TextTower) -> None:
    EditedFeatures.write(tower.module, {PATH: [(1.0, make_edit(tower))]})
    tokens = tower.tokenize(PROMPTS[:1])
    table = tower.root.embeddings.token_embedding.weight.requires_grad_()
    edited = torch.autograd.grad(tower.encode(tokens).square().sum(), table)[0]
    EditedFeatures.write(tower.module, {})
    stock = torch.autograd.grad(tower.encode(tokens).square().sum(), table)[0]
    assert torch.isfinite(edited).all()
    assert not torch.equal(edited, stock)


@torch.no_grad()
def test_removal_leaves_the_module_as_it_was(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock, terms = tower.encode(tokens), {PATH: [(1.0, make_edit(tower))]}
    EditedFeatures.write(tower.module, terms)
    assert EditedFeatures.is_written(tower.module, terms)
    assert not EditedFeatures.is_written(tower.module, {PATH: [(0.5, terms[PATH][0][1])]})
    assert not EditedFeatures.is_written(tower.module, {})
    assert not torch.equal(tower.encode(tokens), stock)
    EditedFeatures.write(tower.module, {})
    assert EditedFeatures.is_written(tower.module, {})
    assert torch.equal(tower.encode(tokens), stock)


@torch.no_grad()
def test_edits_of_one_block_add_up_from_the_stock_state(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock = activations(tower, LAYER, tokens)
    edits = [make_edit(tower, seed=seed) for seed in (0, 1)]
    parts = []
    for edit in edits:
        EditedFeatures.write(tower.module, {PATH: [(1.0, edit)]})
        parts.append(activations(tower, LAYER, tokens) - stock)
    EditedFeatures.write(tower.module, {PATH: [(1.0, edit) for edit in edits]})
    torch.testing.assert_close(activations(tower, LAYER, tokens), stock + parts[0] + parts[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "broken",
    [{"w_dec": torch.zeros(5, 32)}, {"gain": torch.zeros(7)}, {"concept": torch.full((6,), 2)},
     {"concept": torch.full((6,), -1)}, {"gate": torch.zeros(2, 1)}, {"end": torch.zeros(1)}],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_noticed(tower: TextTower, broken: dict[str, torch.Tensor]) -> None:
    assert make_edit(tower).fits()
    assert not make_edit(tower)._replace(**broken).fits()
