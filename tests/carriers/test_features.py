"""Feature edits on a text tower's block, against plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from erasure.backbones import TextTower, backbone_for
from erasure.carriers import features, reconstruction
from erasure.carriers.features import BlockEdit, EditedFeatures, FeatureEdit
from erasure.carriers.reconstruction import ReconstructionEdit
from erasure.interop import hooks
from erasure.sae.stream import activations
from erasure.text.words import word_mask

LAYER, PATH = 1, "encoder.layers.1"
PROMPTS = ["a photo of a cat", "a dog", ""]
OPEN, SHUT = -99.0, 99.0


@pytest.fixture
def tower(tiny_pipe: Any) -> TextTower:
    return backbone_for(tiny_pipe).towers[0]


def make_edit(tower: TextTower, gate: tuple[float, ...] = (OPEN, OPEN), seed: int = 0, **changed: Any) -> FeatureEdit:
    """Eight random latents; concepts own those of their parity, share the last, and count all but the first."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features, concepts = 8, len(gate)
    edits = [(i % concepts, i) for i in range(features - 1)] + [(c, features - 1) for c in range(concepts)]
    votes = [(c, i) for c in range(concepts) for i in range(1, features)]
    made = FeatureEdit(
        w_enc=draw(32, features), b_enc=draw(features), w_dec=draw(features, 32), threshold=draw(features).abs() * 0.1,
        gain=draw(features), offset=draw(features), edits=torch.tensor(edits).T, votes=torch.tensor(votes).T,
        weight=draw(len(votes)), bias=draw(concepts), gate=torch.tensor(gate), probe=draw(32, concepts),
        probe_bias=draw(concepts), probe_gate=torch.tensor(gate), filler=torch.zeros(0, 32), rule=torch.tensor(0),
        local=torch.tensor(0), first=torch.tensor(tower.leading), end=torch.tensor(tower.tokenizer.eos_token_id),
    )  # fmt: skip
    return made._replace(**changed)


def plain(edit: FeatureEdit, x: torch.Tensor, words: list[int], strength: float = 1.0) -> torch.Tensor:
    """The formulas of the module, written out in float64 for one prompt `(tokens, dim)`."""
    x = x.double()
    count, first = len(edit.b_enc), int(edit.first)
    latents = []
    for token in x:
        before = [float(token @ edit.w_enc[:, i].double() + edit.b_enc[i]) for i in range(count)]
        latents.append([value if value > max(float(edit.threshold[i]), 0) else 0.0 for i, value in enumerate(before)])

    def score(token: int, concept: int) -> float:
        if edit.rule:
            return float(x[token] @ edit.probe[:, concept].double() + edit.probe_bias[concept])
        mine = [n for n in range(len(edit.weight)) if edit.votes[0, n] == concept]
        counted = sum(float(edit.weight[n]) * latents[token][int(edit.votes[1, n])] for n in mine)
        return counted + float(edit.bias[concept])

    gates = edit.probe_gate if edit.rule else edit.gate
    result = x.clone()
    opened = [c for c in range(len(gates)) if max(score(t, c) for t in words) >= gates[c]]
    for t in range(first, len(x)):
        active = [c for c in opened if not edit.local or score(t, c) >= gates[c]]
        if len(edit.filler):
            # The end token and the padding sum up the prompt.
            if active or (opened and t >= words[-1]):
                result[t] += strength * (edit.filler[t].double() - x[t])
            continue
        # A latent that several open concepts own is changed once.
        owned = {int(i) for c, i in edit.edits.T.tolist() if c in active}
        for i in owned:
            change = float(edit.gain[i]) * latents[t][i] + float(edit.offset[i]) * (latents[t][i] > 0)
            result[t] += strength * change * edit.w_dec[i].double()
    return result


@torch.no_grad()
@pytest.mark.parametrize("gate", [(OPEN, OPEN), (4.0, SHUT), (SHUT, 6.0)])
@pytest.mark.parametrize("rule", [0, 1])
@pytest.mark.parametrize("form", ["all tokens", "own tokens", "filler"])
def test_equals_the_formulas(tower: TextTower, gate: tuple[float, float], rule: int, form: str) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock = activations(tower, LAYER, tokens)
    local, filler = int(form != "all tokens"), stock[2] if form == "filler" else torch.zeros(0, 32)
    edit = make_edit(tower, gate, rule=torch.tensor(rule), local=torch.tensor(local), filler=filler)
    EditedFeatures.write(tower.module, {PATH: [(0.7, edit)]})
    found = activations(tower, LAYER, tokens)
    for row, length in enumerate(tokens.lengths):
        expected = plain(edit, stock[row], list(range(1, length)), 0.7)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_closed_gate_changes_no_bit_and_does_not_ask_the_neighbours(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock = tower.encode(tokens).states
    words = word_mask(tokens.ids, tower.tokenizer.eos_token_id)
    scores = make_edit(tower).on(torch.device("cpu")).scores(activations(tower, LAYER, tokens), words)
    first, second = scores[:2, 0].logit().tolist()
    assert first != second
    gate = (first + second) / 2
    EditedFeatures.write(tower.module, {PATH: [(1.0, make_edit(tower, (gate, SHUT)))]})
    together = tower.encode(tokens).states
    changed = [not torch.equal(a, b) for a, b in zip(together[:2], stock[:2], strict=True)]
    assert changed == [first > gate, second > gate]
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(
            tower.encode(tower.tokenize([prompt])).states[0], together[row], atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_the_score_does_not_depend_on_padding(tower: TextTower) -> None:
    edit = make_edit(tower).on(torch.device("cpu"))
    long = tower.tokenize(["a photo of a cat"])
    short = long.ids[:, : long.lengths[0]]
    scores = []
    for ids in (long.ids, short):
        states = tower.module(ids, output_hidden_states=True).hidden_states[LAYER + 1]
        scores.append(edit.scores(states, word_mask(ids, edit.end)))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


def smooth_parts(edit: FeatureEdit, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The edit of one prompt `(tokens, dim)` as gradients shall see it near `at`, in plain arithmetic.

    Equal to the edit at `at`. Its latents are those that fire there; in the gates' scores, silent ones come in with
    the slope of a softplus; the gates are sigmoids as wide as `at` is from the threshold.
    """
    pre = lambda value: value @ edit.w_enc + edit.b_enc  # noqa: E731
    level = edit.threshold.clamp_min(0)
    fires = (pre(at) > level).double()
    spread = (pre(at) - level).std(0, correction=0)
    slope = torch.where(fires > 0, 1.0, 1 / (1 + torch.exp(-(pre(at) - level) / spread)))
    latents, fixed = pre(x) * fires, pre(at) * fires
    counted = fixed + slope * (pre(x) - pre(at))
    change = torch.zeros_like(x)
    for feature in range(len(edit.b_enc)):
        own = latents[:, feature] * edit.gain[feature] + fires[:, feature] * edit.offset[feature]
        was = fixed[:, feature] * edit.gain[feature] + fires[:, feature] * edit.offset[feature]
        hard, soft = torch.zeros(len(x)).double(), torch.zeros(len(x)).double()
        for concept in edit.edits[0, edit.edits[1] == feature].tolist():
            mine = (edit.votes[0] == concept).nonzero()[:, 0]
            score = lambda z: z[:, edit.votes[1, mine]] @ edit.weight[mine] + edit.bias[concept]  # noqa: B023, E731
            now, then = score(counted), score(fixed)
            if not edit.local:
                best = int(then.argmax())
                now, then = now[best].expand(len(x)), then[best].expand(len(x))
            width = (then - edit.gate[concept]).abs().clamp_min(1)
            curve = lambda value: 1 / (1 + torch.exp(-(value - edit.gate[concept]) / width))  # noqa: B023, E731
            hard = torch.maximum(hard, (then >= edit.gate[concept]).double())
            soft = soft + curve(now) - curve(then)
        change = change + (hard * own + soft * was)[:, None] * edit.w_dec[feature]
    return x + change


GATES = [(-1.0, SHUT), (-1.0, 2.0), (SHUT, SHUT), (OPEN, OPEN)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("local", [0, 1])
def test_gradients_are_those_of_smooth_gates(tower: TextTower, local: int, gate: tuple[float, float]) -> None:
    single = make_edit(tower, gate, local=torch.tensor(local), first=torch.tensor(0))
    edit = FeatureEdit(*(part.double() if part.is_floating_point() else part for part in single))
    x = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    placed = edit.on(torch.device("cpu"), torch.float64)
    words = torch.ones(1, 4, dtype=torch.bool)
    found = torch.autograd.functional.jacobian(lambda value: value + placed.delta(value, words)[0], x)[0, :, :, 0]
    at, step = x.detach()[0], 1e-6
    for token, dim in [(0, 0), (1, 7), (2, 31), (3, 16)]:
        ahead, behind = at.clone(), at.clone()
        ahead[token, dim] += step
        behind[token, dim] -= step
        expected = (smooth_parts(edit, ahead, at) - smooth_parts(edit, behind, at)) / (2 * step)
        torch.testing.assert_close(found[:, :, token, dim], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["all tokens", "own tokens", "filler", "reconstruction"])
@pytest.mark.parametrize("rule", [0, 1])
@pytest.mark.parametrize("opens", [True, False])
def test_gradients_tell_the_way_to_a_gate_and_change_no_bit(
    tower: TextTower, form: str, rule: int, opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the gate's gradient of "how much is changed" a closed gate opens, and against it an open one closes.

    The edit's own value, seen with gradients or without, is the same to the bit; below the gate it is the stock one.
    """
    tokens = tower.tokenize(PROMPTS[:1])
    stock = activations(tower, LAYER, tokens)
    words = word_mask(tokens.ids, tower.tokenizer.eos_token_id)
    edit: BlockEdit
    if form == "reconstruction":
        edit = make_reconstruction(tower)
        scores = edit.on(stock.device).scores(stock, words)[0, 0]
        edit = edit._replace(gate=scores * (0.95 if opens else 1.05))
    else:
        filler = stock[0].roll(1, 0) if form == "filler" else torch.zeros(0, 32)
        edit = make_edit(tower, (0.0,), rule=torch.tensor(rule), filler=filler)
        edit = edit._replace(local=torch.tensor(int(form != "all tokens")))
        placed = edit.on(stock.device)
        logits = placed.logits(stock, placed.latents(stock), bool(rule))[0, words[0], 0].sort(descending=True).values
        # Where it is open, only the strongest word opens it.
        level = (logits[0] + logits[1]) / 2 if opens else logits[0] + 0.5
        edit = edit._replace(gate=level[None], probe_gate=level[None])
    placed = edit.on(stock.device)
    x = stock.clone().requires_grad_()
    change, opened = placed.delta(x, words)
    assert bool(opened) is opens
    plain_change, plain_opened = placed.delta(stock, words)
    assert torch.equal(change, plain_change)
    assert torch.equal(opened, plain_opened)
    full = placed.delta(stock, None)[0]
    (slope,) = torch.autograd.grad((change * full).sum(), x)
    with monkeypatch.context() as patched:
        for module in (features, reconstruction):
            patched.setattr(module, "straight_through", lambda value, surrogate: value.detach())
        hard = placed.delta(x, words)[0]
        if hard.requires_grad:  # what is left where gates are steps
            slope = slope - torch.autograd.grad((hard * full).sum(), x)[0]
    assert opens or not change.any()
    way = slope / slope.norm() * (-1 if opens else 1)
    moved = [bool(placed.delta(stock + way * size, words)[1]) for size in torch.linspace(0, 20, 400)]
    assert (not opens) in moved

    EditedFeatures.write(tower.module, {PATH: [(1.0, edit)]})
    with torch.no_grad():
        without = activations(tower, LAYER, tokens)
    tower.root.embeddings.token_embedding.weight.requires_grad_()
    with torch.enable_grad():
        tokens_again = tower.tokenize(PROMPTS[:1])
        encoded = tower.encode(tokens_again).states
    assert encoded.requires_grad
    tower.root.embeddings.token_embedding.weight.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(encoded, tower.encode(tokens_again).states)
    assert torch.equal(without, stock) is not opens


def test_an_attack_sees_through_the_hook(tower: TextTower) -> None:
    EditedFeatures.write(tower.module, {PATH: [(1.0, make_edit(tower))]})
    tokens = tower.tokenize(PROMPTS[:1])
    table = tower.root.embeddings.token_embedding.weight.requires_grad_()
    edited = torch.autograd.grad(tower.encode(tokens).states.square().sum(), table)[0]
    EditedFeatures.write(tower.module, {})
    stock = torch.autograd.grad(tower.encode(tokens).states.square().sum(), table)[0]
    assert torch.isfinite(edited).all()
    assert not torch.equal(edited, stock)


@torch.no_grad()
def test_removal_leaves_the_module_as_it_was(tower: TextTower) -> None:
    tokens = tower.tokenize(PROMPTS)
    stock, terms = tower.encode(tokens).states, {PATH: [(1.0, make_edit(tower))]}
    EditedFeatures.write(tower.module, terms)
    assert EditedFeatures.is_written(tower.module, terms)
    assert not EditedFeatures.is_written(tower.module, {PATH: [(0.5, terms[PATH][0][1])]})
    assert not EditedFeatures.is_written(tower.module, {})
    assert not torch.equal(tower.encode(tokens).states, stock)
    EditedFeatures.write(tower.module, {})
    assert EditedFeatures.is_written(tower.module, {})
    assert torch.equal(tower.encode(tokens).states, stock)


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


@torch.no_grad()
def test_a_prompt_that_comes_again_is_not_scored_again(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    from erasure.carriers.features import MEMORY, GatedEdit

    scored: list[int] = []
    real = GatedEdit.delta
    monkeypatch.setattr(GatedEdit, "delta", lambda self, x, *rest: (scored.append(len(x)), real(self, x, *rest))[1])
    EditedFeatures.write(tower.module, {PATH: [(1.0, make_edit(tower))]})
    first = [tower.encode(tower.tokenize([prompt])).states for prompt in PROMPTS]
    again = [tower.encode(tower.tokenize([prompt])).states for prompt in PROMPTS]
    assert len(scored) == len(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # Weights ahead of the block have changed: what is remembered no longer holds.
    tower.root.embeddings.token_embedding.weight.mul_(1.5)
    assert not torch.equal(tower.encode(tower.tokenize(PROMPTS[:1])).states, first[0])
    for index in range(MEMORY + 3):
        tower.encode(tower.tokenize([f"a {'cat ' * index}"]))

    hook = hooks.find_hook(tower.blocks[LAYER], "erasure_features_edit")
    assert len(hook._memory) == MEMORY  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "broken",
    [{"w_dec": torch.zeros(5, 32)}, {"gain": torch.zeros(7)}, {"edits": torch.tensor([[2], [0]])},
     {"votes": torch.tensor([[0], [-1]])}, {"gate": torch.zeros(2, 1)}, {"end": torch.zeros(1)},
     {"probe": torch.zeros(32, 3)}, {"filler": torch.zeros(0, 31)}, {"weight": torch.zeros(3)}],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_noticed(tower: TextTower, broken: dict[str, torch.Tensor]) -> None:
    assert make_edit(tower).fits()
    assert not make_edit(tower)._replace(**broken).fits()


def make_reconstruction(tower: TextTower, gate: float = 0.0) -> ReconstructionEdit:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    factor = torch.ones(40)
    factor[[1, 5, 9, 30]] = -8.0
    return ReconstructionEdit(
        draw(32, 40), draw(40), draw(40, 32), draw(32), torch.tensor(6), factor, torch.tensor(gate),
        torch.tensor(tower.leading), torch.tensor(tower.tokenizer.eos_token_id),
    )  # fmt: skip


@torch.no_grad()
def test_the_reconstruction_equals_the_released_code_s_arithmetic(tower: TextTower) -> None:
    """Encode, keep the k largest, multiply the chosen ones at all tokens but the first, decode; per prompt."""
    tokens = tower.tokenize(PROMPTS)
    stock = activations(tower, LAYER, tokens).double()
    edit = make_reconstruction(tower)
    chosen = [i for i, factor in enumerate(edit.factor.tolist()) if factor != 1]
    expected, change = [], []
    for x in stock:
        rows = []
        for position, token in enumerate(x):
            before = (token @ edit.w_enc.double() + edit.b_enc.double()).tolist()
            kept = sorted(range(40), key=lambda i: -before[i])[:6]
            z = [max(before[i], 0.0) if i in kept else 0.0 for i in range(40)]
            if position >= 1:
                z = [value * -8.0 if i in chosen else value for i, value in enumerate(z)]
            rows.append(torch.tensor(z, dtype=torch.float64) @ edit.w_dec.double() + edit.b_dec.double())
        expected.append(torch.stack(rows))
        change.append(float((expected[-1] - x).square().mean()))
    order = sorted(change)
    gate = (order[0] + order[1]) / 2
    EditedFeatures.write(tower.module, {PATH: [(1.0, make_reconstruction(tower, gate))]})
    found = activations(tower, LAYER, tokens).double()
    for row, difference in enumerate(change):
        wanted = expected[row] if difference >= gate else stock[row]
        torch.testing.assert_close(found[row], wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
    assert 0 < sum(difference >= gate for difference in change) < len(change)


def test_a_reconstruction_that_does_not_fit_is_noticed(tower: TextTower) -> None:
    assert make_reconstruction(tower).fits()
    for broken in ({"factor": torch.ones(39)}, {"k": torch.tensor(41)}, {"gate": torch.zeros(1)}):
        assert not make_reconstruction(tower)._replace(**broken).fits()


def test_gates_are_shares(tower: TextTower) -> None:
    edit = make_edit(tower, (0.0, 2.0), probe_gate=torch.tensor([1.0, -1.0]))
    assert edit.gates.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    assert edit._replace(rule=torch.tensor(1)).gates.tolist() == pytest.approx(
        [1 / (1 + math.exp(-1)), 1 / (1 + math.e)]
    )


def both_kinds(tower: TextTower) -> list[BlockEdit]:
    return [make_edit(tower), make_reconstruction(tower)]


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1])
def test_both_kinds_survive_the_disk(tower: TextTower, kind: int) -> None:
    from erasure.carriers.edits import Edits

    edit = both_kinds(tower)[kind]
    stored = Edits(features={f"text_encoder/{PATH}": edit})
    read = Edits.from_state_dicts(stored.delta_state_dict(), {})
    (back,) = read.features.values()
    assert type(back) is type(edit)
    assert all(torch.equal(a, b) for a, b in zip(edit, back, strict=True))
    assert read.carriers == ["activations"]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.9])
def test_rows_that_only_zeros_meet_are_left_out_of_a_product(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(2, 7, 40, generator=generator) * (torch.rand(40, generator=generator) < share)
    matrix = torch.randn(40, 9, generator=generator)
    expected = sparse.double() @ matrix.double()
    assert torch.allclose(features.product(sparse, matrix).double(), expected, atol=1e-5)
    if share < 0.5:
        # Only rows that are left out may hold what makes a product NaN.
        matrix[~sparse.flatten(0, -2).any(0)] = torch.nan
        assert torch.allclose(features.product(sparse, matrix).double(), expected, atol=1e-5)


def test_gradients_reach_the_rows_that_are_left_out() -> None:
    sparse = torch.zeros(1, 2, 3, requires_grad=True)
    features.product(sparse, torch.ones(3, 4)).sum().backward()
    assert sparse.grad is not None
    assert bool((sparse.grad == 4).all())
