"""SPM against the plain arithmetic of its paper and of its released code."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.backbones import backbone_for
from erasure.carriers import membranes, permeability
from erasure.carriers.membranes import Membrane
from erasure.errors import ArtifactError, IgnoredRetainWarning, OptionError, UnsupportedModelError
from erasure.strategies import get
from erasure.strategies.denoising import trained_parameters
from erasure.strategies.spm import anchor_weights, random_anchors, random_like
from erasure.training.loop import Learner, Share
from tests.strategies.test_concept_ablation import predicted
from tests.strategies.updates import first_update

CAT = Concept("cat", anchor="dog")
PROMPT, OTHER = "a photo of a cat", "a house"
QUICK: dict[str, Any] = {
    "steps": 2, "batch": 2, "retain_batch": 3, "rollout_steps": 3, "contexts": 0, "retain_vocabulary": 2,
    "templates": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_models: Any) -> Any:
    """A tiny Stable Diffusion: what a test attaches it takes off."""
    made = tiny_models["stable-diffusion"]()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def stock(pipe: Any) -> Any:
    """The same model, that nothing is ever attached to."""
    return copy.deepcopy(pipe)


@pytest.fixture
def manager(pipe: Any) -> Any:
    made = ErasureManager(pipe)
    yield made
    made.unload()


def fit(pipe: Any, concepts: Any = CAT, **options: Any) -> Erasure:
    return erasure.erase(
        pipe, concepts, "spm", attach=False, progress=False, **{**QUICK, "lr": 0.1, "floor": 0.0, **options}
    )


def draw(pipe: Any, prompt: Any = PROMPT, **options: Any) -> Tensor:
    chosen = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", **options}
    count = len(prompt) if isinstance(prompt, list) else 1
    return pipe(prompt, generator=[torch.Generator().manual_seed(seed) for seed in range(count)], **chosen).images


def trained(pipe: Any, concept: Concept = CAT, **options: Any) -> tuple[Any, Any, Any]:
    """A strategy, a training of it whose student differs from the stock model, and its first batch."""
    strategy: Any = get("spm").configured(**{**QUICK, **options})
    return strategy, *first_update(strategy, backbone_for(pipe), concept)


# The losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-3", "flux"])
def test_the_erasing_and_the_anchoring_loss_are_plain_arithmetic(tiny_models: Any, family: str) -> None:
    """`|e_student(x, c) - [e(x, b) - eta / g (e(x, c) - e(x, b))]|^2 + w |e_student(x', r) - e(x', r)|^2`."""
    pipe = tiny_models[family]()
    strategy, task, batch = trained(pipe, eta=0.7, retain_weight=2.0)
    with task.student.active():
        found = strategy.losses_of(task.parts[0], 0, batch)
    erase, retain = [], []
    for row, (x, t, g, prompt) in enumerate(zip(batch.x, batch.t, batch.guidance, batch.prompts, strict=True)):
        with task.student.active():
            made = predicted(pipe, x, t, prompt, g)
        own = predicted(pipe, x, t, prompt, g)
        if row < 2:
            base = predicted(pipe, x, t, "dog", g)
            erase.append((made - (base - 0.7 / g * (own - base))).square().mean())
        else:
            retain.append((made - own).square().mean())
    assert batch.prompts[:2] == ["cat"] * 2
    assert float(found["erase"]) == pytest.approx(float(sum(erase) / 2), rel=1e-3)
    assert float(found["retain"]) == pytest.approx(2.0 * float(sum(retain) / 3), rel=1e-3)


@torch.no_grad()
def test_random_anchors_are_matched_at_the_concepts_own_states(pipe: Any) -> None:
    """Of the released code: `e_student(x_t, a) = e(x_t, a)` for embeddings that no prompt has."""
    strategy, task, batch = trained(pipe, anchors="embeddings", base="null", retain_weight=1000.0)
    assert batch.prompts == ["cat", "cat"]
    assert batch.x.shape[0] == 5
    for row in range(3):
        assert torch.equal(batch.x[2 + row], batch.x[row % 2])
        assert batch.t[2 + row] == batch.t[row % 2]
    told = batch.extra["tokens"]
    length = float(task.name.tokens.norm())
    assert all(0.8 * length <= float(row.norm()) <= 1.2 * length for row in told)
    assert len({float(row.flatten()[0]) for row in told}) == 3
    with task.student.active():
        found = strategy.losses_of(task.parts[0], 0, batch)
    lost, erased = [], []
    for row in range(5):
        x, t = batch.x[row : row + 1], batch.t[row]
        text = pipe.encode_prompt("cat", "cpu", 1, False)[0] if row < 2 else told[row - 2][None]
        null = pipe.unet(x, t, encoder_hidden_states=pipe.encode_prompt("", "cpu", 1, False)[0]).sample
        own = pipe.unet(x, t, encoder_hidden_states=text).sample
        with task.student.active():
            made = pipe.unet(x, t, encoder_hidden_states=text).sample
        (erased if row < 2 else lost).append((made - (2 * null - own if row < 2 else own)).square().mean())
    assert float(found["erase"]) == pytest.approx(float(sum(erased) / 2), rel=1e-3)
    assert float(found["retain"]) == pytest.approx(1000.0 * float(sum(lost) / 3), rel=1e-3)


def test_two_processes_draw_the_random_anchors_of_one(pipe: Any) -> None:
    _, task, batch = trained(pipe, anchors="embeddings", retain_batch=4)
    strategy: Any = get("spm").configured(**{**QUICK, "anchors": "embeddings", "retain_batch": 4})
    parts = [strategy.prepare(task, 0, Share(number, 2)) for number in range(2)]
    whole = batch.extra["tokens"]
    for number, part in enumerate(parts):
        assert torch.equal(part.extra["tokens"], whole[number::2])
        assert torch.equal(part.x[1:], batch.x[2:][number::2])


def test_anchors_are_drawn_by_how_far_they_are_from_the_concept(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    told, concept = (torch.randn(count, 3, 4, generator=generator) for count in (5, 1))
    for alpha in (-2.0, 0.0, 1.0, 3.0):
        own = concept.double().numpy().ravel()
        cosines = [float(row @ own / np.linalg.norm(row) / np.linalg.norm(own))
                   for row in told.double().flatten(1).numpy()]  # fmt: skip
        np.testing.assert_allclose(
            anchor_weights(told, concept, alpha), [(1 - cosine) ** alpha for cosine in cosines], rtol=1e-6
        )
    strategy, task, _ = trained(pipe, alpha=2.0)
    part = task.parts[0]
    part.weights = torch.arange(len(part.weights)).double()
    drawn = strategy.chosen(part, part.retain_states, 4000, "retain", 0) // part.retain_states.per_scene
    share = torch.bincount(drawn, minlength=len(part.weights)) / 4000
    torch.testing.assert_close(share.double(), part.weights / part.weights.sum(), atol=0.03, rtol=0)


def test_a_random_anchor_is_taken_with_the_chance_of_the_released_code() -> None:
    """In two dimensions cosines are far from zero, so that the chance `min(1, 1 - cos)` shows in their mean.

    With the angle even in 0 to 2 pi that is `-(pi / 2) / (2 pi - 2)`.
    """
    generator = torch.Generator().manual_seed(1)
    vector = torch.tensor([3.0, 4.0])
    rows = torch.stack([random_like(vector, 1.0, generator) for _ in range(3000)])
    lengths, cosines = rows.norm(dim=1) / 5, rows @ vector / rows.norm(dim=1) / 5
    assert float(lengths.min()) >= 0.8
    assert float(lengths.max()) <= 1.2
    assert float(lengths.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(cosines.mean()) == pytest.approx(-(math.pi / 2) / (2 * math.pi - 2), abs=0.04)
    plain = torch.stack([random_like(vector, 0.0, generator) for _ in range(3000)])
    assert float((plain @ vector / plain.norm(dim=1) / 5).mean()) == pytest.approx(0.0, abs=0.04)


def test_pooled_vectors_have_anchors_of_their_own(tiny_models: Any) -> None:
    told = backbone_for(tiny_models["stable-diffusion-xl"]()).encode(["cat"])
    made = random_anchors(told, [3, 4], 1.0)
    for part, own in ((made.tokens, told.tokens), (made.pooled, told.pooled)):
        assert part.shape == (2, *own.shape[1:])
        assert all(0.79 < float(row.norm() / own.norm()) < 1.21 for row in part)


def test_the_learning_rate_falls_along_cosines_behind_the_warm_up(pipe: Any) -> None:
    """As `cosine_with_restarts` of diffusers has it; the warm-up begins one update earlier, as everywhere here."""
    from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup as schedule

    strategy, task, _ = trained(pipe, steps=50, lr=0.5, warmup=8, cycles=3)
    learner = Learner(strategy.turns(task, ())[0], strategy.steps)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    wanted, known = [], schedule(optimiser, 8, 50, 3)
    for _ in range(50):
        wanted.append(known.get_last_lr()[0])
        optimiser.step()
        known.step()
    found = [learner.rate(update) for update in range(50)]
    np.testing.assert_allclose(found[8:], wanted[8:], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found[:7], wanted[1:8], rtol=1e-9)
    assert [get("spm").configured(cycles=0, lr=0.5).descent.cycles, strategy.descent.cycles] == [0, 3]


# Where the adapters are ----------------------------------------------------------------------------------------------


def test_every_linear_layer_of_the_transformers_has_a_branch(pipe: Any, tiny_models: Any) -> None:
    made = fit(pipe)
    wanted = {
        f"unet/{name}" for name, module in pipe.unet.named_modules()
        if ".attentions." in f".{name}" and isinstance(module, (nn.Linear, nn.Conv2d))
    }  # fmt: skip
    assert set(made.edits.membranes) == wanted
    assert any(isinstance(pipe.unet.get_submodule(key[5:]), nn.Conv2d) for key in wanted)
    flux = tiny_models["flux"]()
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    paths = {path.rpartition(".")[0] for path in trained_parameters(backbone_for(flux), "blocks")}
    assert paths == {
        name for name, module in flux.transformer.named_modules()
        if name.startswith(blocks) and isinstance(module, nn.Linear)
    }  # fmt: skip


def test_the_file_is_of_rank_one(pipe: Any, tmp_path: Path) -> None:
    made = fit(pipe, [CAT, Concept("dog")])
    values = sum(part.numel() for branch in made.edits.membranes.values() for part in branch)
    sides = [sum(pipe.unet.get_submodule(key[5:]).weight.shape[:2]) for key in made.edits.membranes]
    assert values == 2 * sum(sides)
    again = Erasure.load(made.save(tmp_path / "made"))
    assert again.edits.equals(made.edits)
    assert again.config.carriers == ["activations"]


# Facilitated transport -----------------------------------------------------------------------------------------------


def plain_permeability(pipe: Any, prompt: str, names: list[str]) -> float:
    """`max(cos of all states in a row, share of a name's tokens that the prompt has)`, as the released code has it."""
    special = {pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id}

    def read(text: str) -> tuple[np.ndarray, set[int]]:
        ids = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipe.text_encoder(ids)[0]
        return states.double().numpy().ravel(), set(ids[0].tolist()) - special

    own, words = read(prompt)
    found = []
    for name in names:
        states, tokens = read(name)
        cosine = float(own @ states / np.linalg.norm(own) / np.linalg.norm(states))
        found.append(max(cosine, len(words & tokens) / len(tokens)))
    return max(found)


def test_the_permeability_is_the_released_codes(pipe: Any, stock: Any) -> None:
    concepts = [Concept("cat", synonyms="kitten"), Concept("red car")]
    gate = fit(pipe, concepts).edits.gates["unet/text_encoder"]
    for prompt in (PROMPT, OTHER, "a red house", "", "cat", "a kitten in a red car"):
        ids = stock.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            states = stock.text_encoder(ids)[0][0]
        found = permeability.permeability(gate, states, ids[0])
        wanted = [plain_permeability(stock, prompt, names) for names in (["cat", "kitten"], ["red car"])]
        # Names are kept in half precision.
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_overlap_and_the_floor_on_numbers() -> None:
    names = torch.tensor([[5, 6, -1], [7, 7, 8]])
    assert permeability.overlap(torch.tensor([6, 9]), names).tolist() == [0.5, 0.0]
    assert permeability.overlap(torch.tensor([7, 5, 6]), names).tolist() == [1.0, 0.5]
    gate = permeability.PromptGate(
        torch.eye(2)[:, None], torch.tensor([[5], [7]]), torch.tensor([0, 1]), torch.tensor([0.7, 0.9]),
        torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 1]), torch.tensor([1, 0, 0]),
    )  # fmt: skip
    states = torch.tensor([[3.0, 4.0]])
    assert permeability.nearness(gate, states, torch.tensor([9, 1])).tolist() == pytest.approx([0.6, 0.8])
    assert permeability.permeability(gate, states, torch.tensor([9, 1])).tolist() == [0.0, 0.0]
    assert permeability.permeability(gate, states, torch.tensor([7, 1])).tolist() == [0.0, 1.0]
    near = gate._replace(floor=torch.tensor([0.5, 0.9]))
    assert permeability.permeability(near, states, torch.tensor([9, 1])).tolist() == pytest.approx([0.6, 0.0])


def test_branches_on_numbers() -> None:
    """`sum_c g_c up_c down_c x`, and the sums of both factors multiplied: `g^2` and cross terms."""
    generator = torch.Generator().manual_seed(2)
    edit = Membrane(torch.randn(2, 1, 5, generator=generator), torch.randn(2, 4, 1, generator=generator))
    x, gates = torch.randn(3, 7, 5, generator=generator), torch.tensor([[0.5, 2.0], [0.0, 1.0], [0.0, 0.0]])
    one, two = (edit.up[place] @ edit.down[place] for place in range(2))
    for row in range(3):
        g, h = gates[row].tolist()
        torch.testing.assert_close(membranes.added(x, edit, gates, False)[row], x[row] @ (g * one + h * two).T)
        mixed = (g * edit.up[0] + h * edit.up[1]) @ (g * edit.down[0] + h * edit.down[1])
        torch.testing.assert_close(membranes.added(x, edit, gates, True)[row], x[row] @ mixed.T)
    torch.testing.assert_close(membranes.added(x, edit, None, False), x @ (one + two).T)


def in_weights(stock: Any, made: Erasure, scale: float) -> Any:
    """A pipeline whose weights are `W + scale up down`, written plainly."""
    changed = copy.deepcopy(stock)
    with torch.no_grad():
        for key, branch in made.edits.membranes.items():
            weight = changed.unet.get_submodule(key[5:]).weight
            for down, up in zip(branch.down.float(), branch.up.float(), strict=True):
                weight += scale * (up @ down).view(weight.shape)
    return changed


@pytest.mark.parametrize(("transport", "power"), [("product", 1), ("factors", 2)])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_drawing_is_the_papers(
    pipe: Any, stock: Any, manager: ErasureManager, transport: str, power: int, strength: float
) -> None:
    """One multiplier for the whole pass of a prompt, negative prompts included: the released code's is squared."""
    made = fit(pipe, transport=transport, negatives="prompt")
    manager.add(made, strength=strength)
    for prompt in (PROMPT, OTHER):
        scale = strength * plain_permeability(stock, prompt, ["cat"]) ** power
        wanted = draw(in_weights(stock, made, scale), prompt)
        found = draw(pipe, prompt)
        assert float((found - wanted).abs().max()) <= 2e-3 * float(wanted.abs().max())
        assert float((found - draw(stock, prompt)).abs().max()) > 2e-2


def test_every_prompt_of_a_batch_has_its_own_permeability(pipe: Any, stock: Any, manager: ErasureManager) -> None:
    made = fit(pipe, negatives="prompt")
    manager.add(made)
    together = draw(pipe, [PROMPT, OTHER])
    for row, prompt in enumerate([PROMPT, OTHER]):
        other = in_weights(stock, made, plain_permeability(stock, prompt, ["cat"]))
        wanted = draw(other, [PROMPT, OTHER])[row]
        assert float((together[row] - wanted).abs().max()) <= 2e-3 * float(wanted.abs().max())


def test_what_opens_no_gate_is_the_stock_models_to_the_bit(pipe: Any, manager: ErasureManager) -> None:
    made = fit(pipe, [CAT, Concept("dog")], floor=None)
    prompts = [PROMPT, OTHER, ""]
    before, negative = draw(pipe, prompts), draw(pipe, OTHER, negative_prompt="a cat")
    manager.add(made)
    after = draw(pipe, prompts)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])
    assert torch.equal(draw(pipe, OTHER, negative_prompt="a cat"), negative)
    assert all(float(floor) > 0 for floor in made.edits.gates["unet/text_encoder"].floor)
    manager.unload()
    assert torch.equal(draw(pipe, prompts), before)


def test_prompts_that_must_survive_lie_below_the_floor(pipe: Any, stock: Any) -> None:
    made = fit(pipe, Concept("cat", retain=("dog", "house")), floor=None, templates=True)
    floor = float(made.edits.gates["unet/text_encoder"].floor)
    assert made.config.cost["cat_floor"] == pytest.approx(floor, abs=1e-5)
    near = [plain_permeability(stock, f"a photo of a {word}", ["cat"]) for word in ("dog", "house")]
    assert max(near) < floor
    assert plain_permeability(stock, PROMPT, ["cat"]) >= floor


def test_each_concept_has_its_own_adapter(pipe: Any, manager: ErasureManager) -> None:
    """Trained together they are what they are alone, and only the gate that is open lets one through."""
    alone, both = fit(pipe, CAT, floor=1.0), fit(pipe, [CAT, Concept("house")], floor=1.0)
    for key, branch in alone.edits.membranes.items():
        assert torch.equal(both.edits.membranes[key].down[:1], branch.down)
        assert torch.equal(both.edits.membranes[key].up[:1], branch.up)
    manager.add(alone)
    wanted = draw(pipe)
    manager.unload()
    manager.add(both)
    torch.testing.assert_close(draw(pipe), wanted)


def test_embeddings_that_nobody_has_read_let_everything_through(
    pipe: Any, stock: Any, manager: ErasureManager
) -> None:
    made = fit(pipe, negatives="prompt")
    known, null = stock.encode_prompt(OTHER, "cpu", 1, True)
    manager.add(made)
    with pytest.warns(UserWarning, match="prompt_embeds= bypasses"):
        unread = draw(pipe, None, prompt_embeds=1.3 * known, negative_prompt_embeds=null)
    wanted = draw(in_weights(stock, made, 1.0), None, prompt_embeds=1.3 * known, negative_prompt_embeds=null)
    assert float((unread - wanted).abs().max()) <= 2e-3 * float(wanted.abs().max())
    own, null = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    assert torch.equal(draw(pipe), draw(pipe, None, prompt_embeds=own, negative_prompt_embeds=null))


def test_what_one_text_encoder_finds_opens_the_gates_of_all(tiny_models: Any) -> None:
    pipe = tiny_models["flux"]()
    pipe.set_progress_bar_config(disable=True)
    made = fit(pipe, floor=1.0, text_length=24)
    assert set(made.edits.gates) == {"transformer/text_encoder", "transformer/text_encoder_2"}
    assert [gate.source for gate in made.edits.gates.values()] == [permeability.POOLED, permeability.TOKENS]
    told = {"max_sequence_length": 24}
    before = draw(pipe, OTHER, **told)
    with_word = draw(pipe, OTHER, prompt_2=PROMPT, **told)
    manager = ErasureManager(pipe)
    manager.add(made)
    assert torch.equal(draw(pipe, OTHER, **told), before)
    with pytest.warns(UserWarning, match="prompt_2"):
        assert not torch.equal(draw(pipe, OTHER, prompt_2=PROMPT, **told), with_word)
    with pytest.warns(UserWarning, match="prompt_2"):
        assert not torch.equal(draw(pipe, PROMPT, prompt_2=OTHER, **told), draw(pipe, OTHER, **told))


def test_erasures_stack_and_add_up(pipe: Any, manager: ErasureManager, tmp_path: Path) -> None:
    one, other = fit(pipe, CAT, floor=1.0), fit(pipe, Concept("house"), floor=1.0)
    before = draw(pipe, [PROMPT, OTHER])
    alone = []
    for made in (one, other):
        manager.add(made)
        alone.append(draw(pipe, [PROMPT, OTHER]))
        manager.unload()
    manager.add(one, "one")
    manager.add(other, "other")
    both = draw(pipe, [PROMPT, OTHER])
    assert torch.equal(both[0], alone[0][0])
    assert torch.equal(both[1], alone[1][1])
    manager.delete("one")
    assert torch.equal(draw(pipe, [PROMPT, OTHER]), alone[1])
    manager.unload()
    assert torch.equal(draw(pipe, [PROMPT, OTHER]), before)
    folder = one.save(tmp_path / "one")
    added = erasure.erase(
        pipe, "house", "spm", add_to=folder, attach=False, progress=False, **{**QUICK, "lr": 0.1, "floor": 1.0}
    )
    gate = added.edits.gates["unet/text_encoder"]
    assert gate.concepts.tolist() == [0, 1]
    key, branch = next(iter(added.edits.membranes.items()))
    assert torch.equal(branch.down[:1], one.edits.membranes[key].down)
    manager.add(added)
    torch.testing.assert_close(draw(pipe, [PROMPT, OTHER])[0], alone[0][0], atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedModelError, match="read in different ways"):
        erasure.erase(
            pipe, "house", "spm", add_to=folder, attach=False, progress=False,
            **{**QUICK, "floor": 1.0, "transport": "factors"},
        )  # fmt: skip


def test_a_network_that_runs_without_its_gates_is_erased_wholly(pipe: Any, manager: ErasureManager) -> None:
    layer = Membrane(torch.ones(1, 1, 2), torch.ones(1, 2, 1))
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    x = torch.tensor([[1.0, 2.0]])
    before = net(x)
    membranes.write(net, {"0": [membranes.Term(0.5, layer, 0, False)]})
    torch.testing.assert_close(net(x), before + 1.5)
    membranes.let_through((None,))
    assert torch.equal(net(x), before)
    membranes.let_through((torch.tensor([[0.5]]),))
    torch.testing.assert_close(net(x), before + 0.75)
    membranes.let_through((torch.tensor([[1.0], [0.0]]),))
    twice = net(x.repeat(4, 1))
    torch.testing.assert_close(twice, before + torch.tensor([[1.5], [0.0], [1.5], [0.0]]))
    with pytest.raises(UnsupportedModelError, match="3 rows in a pass of 2"):
        net(x.repeat(3, 1))
    membranes.let_through(None)
    membranes.write(net, {})
    assert torch.equal(net(x), before)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_options_that_do_not_go_together_are_refused(pipe: Any) -> None:
    for wrong, message in (
        ({"rank": 0}, "'rank' is 0"),
        ({"anchors": "embeddings", "scope_weight": 1.0}, "'scope_weight'"),
        ({"anchors": "embeddings", "projection": 0.5}, "'projection'"),
        ({"anchors": "embeddings", "alpha": -1.0}, "'alpha'"),
    ):
        with pytest.raises(OptionError, match=message):
            get("spm").configured(**wrong)
    with pytest.warns(IgnoredRetainWarning, match="'anchors'"):
        fit(pipe, Concept("cat", retain="dog"), anchors="embeddings")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("floor", torch.tensor([1.5]), "allowed: 0 to 1"),
        ("concepts", torch.tensor([1]), "without a name"),
        ("ids", torch.tensor([[-1, 3]]), "without a name"),
        ("rules", torch.tensor([1, 0, 2]), "other than 0 and 1"),
        ("marks", torch.tensor([-1, 2]), "below 0"),
        ("states", torch.zeros(1, 3), "does not fit together"),
        ("floor", torch.tensor([0.5, 0.5]), "without a name"),
    ],
)
def test_a_gate_that_is_damaged_is_refused(pipe: Any, field: str, value: Tensor, message: str) -> None:
    made = fit(pipe, steps=1)
    made.edits.gates["unet/text_encoder"] = made.edits.gates["unet/text_encoder"]._replace(**{field: value})
    with pytest.raises(ArtifactError, match=message):
        made.edits.check()


def test_branches_and_gates_go_together(pipe: Any) -> None:
    made = fit(pipe, steps=1)
    gates, branches = dict(made.edits.gates), dict(made.edits.membranes)
    made.edits.gates.clear()
    with pytest.raises(ArtifactError, match="branches without gates"):
        made.edits.check()
    made.edits.gates |= gates
    made.edits.membranes.clear()
    with pytest.raises(ArtifactError, match="gates without branches"):
        made.edits.check()
    made.edits.membranes |= branches
    key = next(iter(branches))
    made.edits.membranes[key] = Membrane(*(part.repeat(2, 1, 1) for part in branches[key]))
    with pytest.raises(ArtifactError, match="do not fit together"):
        made.edits.check()


def test_a_layer_of_another_shape_is_another_model(pipe: Any, manager: ErasureManager) -> None:
    made = fit(pipe, steps=1)
    key = next(iter(made.edits.membranes))
    branch = made.edits.membranes[key]
    made.edits.membranes[key] = branch._replace(down=torch.ones(1, 1, branch.down.shape[2] + 1))
    with pytest.raises(erasure.errors.WrongBaseError, match="made for another model"):
        manager.add(made, check_base=False)
    assert math.isfinite(float(draw(pipe).abs().max()))


def test_hooks_that_something_removed_are_noticed(pipe: Any, manager: ErasureManager) -> None:
    from erasure.errors import VerificationError
    from erasure.interop import hooks, paths

    manager.add(fit(pipe))
    assert manager.verify() > 10
    path = next(iter(manager.erasures.values())).edits.membranes_of("unet")
    hooks.remove_hooks(paths.layer(pipe.unet, next(iter(path))), "erasure_membrane")
    with pytest.raises(VerificationError, match="branches beside layers"):
        manager.verify()
