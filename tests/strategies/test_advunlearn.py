"""AdvUnlearn: each thing that the released code has wrong, shown right here."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import erasure
from erasure import Concept, ErasureManager
from erasure.backbones import TextTower, backbone_for, text_towers
from erasure.errors import ConceptError, DivergenceError, NoMatchingModuleError, OptionError
from erasure.strategies import get
from erasure.training.attack import attacked, prefixed, random_words, vocabulary_spread
from erasure.training.loop import Share
from erasure.training.trajectories import rolling_out
from tests.strategies.updates import first_update

CAT = Concept("cat", anchor="dog")
QUICK: dict[str, Any] = {
    "steps": 4, "batch": 2, "retain_batch": 2, "rollout_steps": 3, "contexts": 0, "retain_vocabulary": 2,
    "attack_steps": 2, "attack_from": 0.0, "resolution": 16,
}  # fmt: skip


def make(pipe: Any, **options: Any) -> erasure.Erasure:
    return erasure.erase(pipe, CAT, "advunlearn", attach=False, progress=False, **{**QUICK, **options})


@pytest.fixture
def tower(tiny_pipe_original: Any) -> TextTower:
    return backbone_for(tiny_pipe_original).towers[0]


# The attack ----------------------------------------------------------------------------------------------------------


def quadratic(goal: Tensor) -> Any:
    return lambda vectors, step: ((vectors - goal) * (1 + 0.1 * step)).square().sum()


def attack(goal: Tensor, start: Tensor, *, lr: float, **options: Any) -> Tensor:
    """Vectors of one text encoder after an attack."""
    loss = quadratic(goal)
    found = attacked(lambda vectors, step: loss(vectors["one"], step), {"one": start}, lr={"one": lr}, **options)
    return found["one"]


def test_every_step_has_a_gradient_of_its_own() -> None:
    """Adam written out, with no gradient carried from step to step, and the vectors after the last step."""
    goal, start = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.0, 3.0]]])
    found = attack(goal, start, steps=5, lr=0.2, signed=False)
    x, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(5):
        gradient = 2 * (x - goal) * (1 + 0.1 * step) ** 2
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        x = x - 0.2 * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(found, x)
    assert not found.requires_grad


def test_a_single_signed_step_moves_the_vectors() -> None:
    """In the released code it trains on the vectors from before the step."""
    goal, start = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.0, 3.0]]])
    found = attack(goal, start, steps=1, lr=0.5, signed=True)
    torch.testing.assert_close(found, torch.tensor([[[0.5, 2.5]]]))
    assert start.tolist() == [[[0.0, 3.0]]]


@pytest.mark.parametrize("signed", [False, True])
def test_the_released_code_s_way_adds_gradients_up_and_trains_on_the_vectors_before(signed: bool) -> None:
    goal, start = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.0, 3.0]]])
    found = attack(goal, start, steps=4, lr=0.3, signed=signed, accumulates=True)
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.3)
    for step in range(4):
        handed = x.detach().clone()
        quadratic(goal)(x, step).backward()  # nobody calls zero_grad
        if signed:
            x.grad.sign_()
        adam.step()
    torch.testing.assert_close(found, handed)
    alone = attack(goal, start, steps=1, lr=0.3, signed=signed, accumulates=True)
    assert torch.equal(alone, start), "its single step has no effect"


def test_nan_in_the_attack_is_an_error() -> None:
    with pytest.raises(DivergenceError, match="its step 0"):
        attacked(
            lambda vectors, step: vectors["a"].sum() * torch.nan, {"a": torch.zeros(1, 1, 2)}, steps=2, lr={"a": 1},
            signed=False,
        )  # fmt: skip


@pytest.mark.parametrize("words", ["cat", "van gogh", "zebra"])
def test_all_tokens_of_a_concept_stay(tower: TextTower, words: str) -> None:
    """A word of several tokens ("zebra" is five letters here) is counted in tokens, not in words."""
    own = tower.tokenizer(words).input_ids
    tokens, place = prefixed(tower, [words, "a photo of a dog"], 2)
    assert place.tolist() == [1, 2]
    assert tokens.ids[0, :3].tolist()[0] == own[0]
    assert tokens.ids[0, 3 : 3 + len(own) - 1].tolist() == own[1:]
    assert tokens.lengths[0] == len(own) + 2
    assert tokens.ids.shape[1] == tower.max_length


def test_a_learned_token_behind_the_room_keeps_its_vectors(tiny_pipe: Any, teach: Any) -> None:
    teach(tiny_pipe, "a", "cat", "a")
    tower = text_towers(tiny_pipe)[0]
    tokens, place = prefixed(tower, ["<my-pet> and a dog"], 2)
    assert tokens.ids[0, place[-1] + 1 :][:3].tolist() == tower.word_ids("<my-pet>")


def test_a_prompt_that_is_cut_keeps_its_end(tower: TextTower) -> None:
    tokens, _ = prefixed(tower, [" ".join(["cat"] * 80), "a dog"], 3)
    assert tokens.ids[:, -1].tolist() == [tower.end] * 2
    assert tokens.lengths == [77, 7]
    assert tokens.ids[0, 4:-1].tolist() == tower.word_ids("cat") * 72


def test_no_room_for_vectors_is_refused(tower: TextTower) -> None:
    assert prefixed(tower, ["cat"], 74)[0].ids[0, -2:].tolist() == [*tower.word_ids("cat"), tower.end]
    with pytest.raises(ConceptError, match="75 tokens ahead of a prompt leave no room"):
        prefixed(tower, ["cat"], 75)


def test_the_adversary_starts_from_words(tower: TextTower) -> None:
    table = tower.root.embeddings.token_embedding.weight
    found = random_words(tower, 3, 2, torch.Generator().manual_seed(0))
    assert found.shape == (3, 2, 32)
    assert all((table == row).all(1).any() for row in found.flatten(0, 1))
    assert vocabulary_spread(tower) == pytest.approx(float(table.std(0).mean()))


def filled(pipe: Any, **options: Any) -> tuple[Any, Any]:
    """A strategy and its task, with states rolled out."""
    strategy: Any = get("advunlearn").configured(**{**QUICK, **options})
    backbone = backbone_for(pipe)
    task = strategy.task(backbone, backbone.towers[0], [CAT], 0, Accelerator(cpu=True))
    with rolling_out(backbone):
        for source in task.sources():
            source.fill()
    return strategy, task


def test_the_attack_lowers_its_loss(tiny_pipe: Any) -> None:
    """The inner loop finds vectors that are closer to drawing the concept than those it starts from."""
    strategy, task = filled(tiny_pipe, attack_steps=20, attack_lr=1.0)
    with torch.no_grad():
        for up in task.student.up:
            up.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    with rolling_out(task.backbone):
        batch = strategy.prepare(task, 0, Share(0, 1))
    loss = partial(strategy.attack_loss, task, 0, Share(0, 1), batch.prompts[:2], batch.concept.scene)
    start = {"text_encoder": random_words(task.tower, 2, 1, torch.Generator().manual_seed(1))}
    with task.student.active(), torch.no_grad():
        ahead, reached = (sum(float(loss(vectors, turn)) for turn in range(8)) for vectors in (start, batch.extra))
    assert reached < ahead
    assert all(parameter.grad is None for parameter in task.student.parameters())


def test_what_is_trained_against_an_attack_resists_it(tiny_pipe: Any) -> None:
    """The same attack comes less near to the concept than it does on a text encoder that never met an adversary."""
    options: dict[str, Any] = {**QUICK, "templates": False, "steps": 30, "lr": 3e-3, "attack_lr": 1.0}
    strategy, task = filled(tiny_pipe, **options)
    prompts, scenes = ["cat"] * 2, torch.zeros(2, dtype=torch.long)
    reached = {}
    for trained_against in (0, 3):
        made = make(tiny_pipe, **{**options, "attack_steps": trained_against})
        manager = ErasureManager(tiny_pipe)
        manager.add(made, "cat")
        with rolling_out(task.backbone):
            loss = partial(strategy.attack_loss, task, 999, Share(0, 1), prompts, scenes)
            start = {"text_encoder": random_words(task.tower, 2, 1, torch.Generator().manual_seed(3))}
            lr = {"text_encoder": vocabulary_spread(task.tower)}
            found = attacked(loss, start, steps=20, lr=lr, signed=False)
            with torch.no_grad():
                reached[trained_against] = sum(float(loss(found, 100 + turn)) for turn in range(8))
        manager.unload()
    assert reached[3] > 2 * reached[0]


# What is trained -----------------------------------------------------------------------------------------------------


def trained_layers(made: erasure.Erasure) -> set[str]:
    return {path.split("/")[1].split(".self_attn")[0].split(".mlp")[0] for path in made.edits.parameters}


def test_layers_are_chosen_by_number(tiny_pipe: Any) -> None:
    """A prefix match takes layers 10 and 11 for "layers.1" as well."""
    from transformers import CLIPTextConfig, CLIPTextModel

    known = tiny_pipe.text_encoder.config.to_dict()
    tiny_pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**{**known, "num_hidden_layers": 12})).eval()
    made = make(tiny_pipe, layers=(0, 1), steps=1)
    assert trained_layers(made) == {"encoder.layers.0", "encoder.layers.1"}
    with pytest.raises(NoMatchingModuleError, match=r"encoder.layers.12"):
        make(tiny_pipe, layers=(12,))


def test_all_blocks_and_the_final_norm_in_full(tiny_pipe_original: Any) -> None:
    made = make(tiny_pipe_original, rank=0, steps=1)
    expected = {
        f"text_encoder/{name}"
        for name, _ in tiny_pipe_original.text_encoder.named_parameters()
        if not name.startswith("embeddings.")
    }
    assert set(made.edits.parameters) == expected


def test_the_denoiser_is_untouched(tiny_pipe_original: Any) -> None:
    assert make(tiny_pipe_original).components == ["text_encoder"]


@pytest.mark.parametrize("preset", get("advunlearn").presets)
def test_presets_run(preset: str, tiny_pipe_original: Any) -> None:
    made = erasure.erase(
        tiny_pipe_original, CAT, "advunlearn", preset=preset, steps=1, rollout_steps=2, rollouts=1, attack_from=0.0,
        retain_vocabulary=0, resolution=16, attach=False, progress=False,
    )  # fmt: skip
    assert len(made.edits)


def test_the_adversary_changes_the_result_and_sets_in_late(tiny_pipe_original: Any) -> None:
    plain, attack, late = (
        make(tiny_pipe_original, **options) for options in ({"attack_steps": 0}, {}, {"attack_from": 1.0})
    )

    def same(first: erasure.Erasure, second: erasure.Erasure) -> bool:
        pairs = zip(first.edits.low_rank.values(), second.edits.low_rank.values(), strict=True)
        return all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in pairs)

    assert same(plain, late)
    assert not same(plain, attack)
    # Each of 4 updates has 2 turns on 2 rows, of 3 passes each.
    assert attack.config.cost["denoiser_forwards"] - plain.config.cost["denoiser_forwards"] == 4 * 2 * 2 * 3


def test_a_bank_takes_a_tenth_of_the_passes(tiny_pipe_original: Any) -> None:
    """Per update; the bank itself is made once."""
    whole: Any = get("advunlearn").configured()
    settings = {
        "steps": 1, "attack_from": 0.0, "rollout_steps": 50, "batch": whole.batch,
        "retain_batch": whole.retain_batch, "retain_vocabulary": 0, "contexts": 0, "templates": False,
        "attack_steps": whole.attack_steps,
    }  # fmt: skip
    bank, online = (make(tiny_pipe_original, states=states, **settings).config.cost for states in ("buffer", "online"))
    update = bank["denoiser_forwards"] - bank["rollout_forwards"]
    assert online["denoiser_forwards"] > 10 * update


@pytest.mark.parametrize(
    "options", [{"attack_tokens": 0}, {"attacked": 1.5}, {"attack_from": 2.0}, {"rollout_by": "student"}], ids=str
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="advunlearn"):
        get("advunlearn").configured(**options)


# Several text encoders -----------------------------------------------------------------------------------------------


def test_every_block_that_the_denoiser_reads_is_trained(tiny_xl: Any) -> None:
    """Of SDXL's first encoder it reads a state ahead of the last block, of the second the pooled vector too."""
    made = make(tiny_xl, rank=0, steps=1)
    blocks = {path.partition(".self_attn")[0].partition(".mlp")[0] for path in made.edits.parameters}
    blocks = {path.rpartition(".layer_norm")[0] or path for path in blocks}
    first = {f"text_encoder/encoder.layers.{number}" for number in range(3)}
    second = {f"text_encoder_2/encoder.layers.{number}" for number in range(4)}
    norm = {f"text_encoder_2/final_layer_norm.{part}" for part in ("weight", "bias")}
    assert blocks == first | second | norm
    # The bias of keys adds the same to all that a query sees, so it has no gradient.
    assert all(delta.any() for path, delta in made.edits.deltas.items() if not path.endswith("k_proj.bias"))


def test_text_encoders_are_chosen_by_name(tiny_xl: Any) -> None:
    made = make(tiny_xl, text_encoders=("text_encoder_2",), steps=2)
    assert made.components == ["text_encoder_2"]
    with pytest.raises(OptionError, match=r"'text_encoder_3'.*those of the pipeline: text_encoder, text_encoder_2"):
        make(tiny_xl, text_encoders=("text_encoder_3",))
    with pytest.raises(OptionError, match="text_encoders"):
        make(tiny_xl, text_encoders=("unet",))
    with pytest.raises(NoMatchingModuleError, match="ahead of its block 3: choose blocks below 3"):
        make(tiny_xl, layers=(3,))
    assert make(tiny_xl, layers=(3,), text_encoders=("text_encoder_2",), steps=1).components == ["text_encoder_2"]


@pytest.mark.parametrize("attacked", [("text_encoder", "text_encoder_2"), ("text_encoder_2",)])
def test_an_update_on_two_encoders_is_plain_arithmetic(tiny_xl: Any, attacked: tuple[str, ...]) -> None:
    """Both encoders read the prompt, the attacked ones behind vectors of their own; the pooled vector is the second's.

    What the teacher is told without a prompt is zeros.
    """
    strategy: Any = get("advunlearn").configured(
        **{**QUICK, "base": "null", "text_encoders": attacked, "scope_weight": 0.5, "retain_weight": 2.0}
    )
    backbone = backbone_for(tiny_xl)
    task, batch = first_update(strategy, backbone, CAT)
    assert batch.extra is not None
    assert set(batch.extra) == set(attacked)

    def encode(suffix: str, prompt: str, vector: Tensor | None) -> Any:
        encoder, tokenizer = getattr(tiny_xl, f"text_encoder{suffix}"), getattr(tiny_xl, f"tokenizer{suffix}")
        ids = tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
        if vector is None:
            return encoder(ids, output_hidden_states=True)
        ids = torch.cat([ids[:, :1], torch.full((1, 1), 5), ids[:, 1:-1]], 1)
        table = encoder.get_input_embeddings()
        handle = table.register_forward_hook(
            lambda _m, _a, out: torch.cat([out[:, :1], vector[None, None], out[:, 2:]], 1)
        )
        try:
            return encoder(ids, output_hidden_states=True)
        finally:
            handle.remove()

    def predict(x: Tensor, t: Tensor, prompt: str | None, vectors: list[Tensor | None]) -> Tensor:
        first, second = (encode(s, prompt or "", v) for s, v in zip(("", "_2"), vectors, strict=True))
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], 2)
        pooled = second.text_embeds
        if prompt is None:
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        told = {"text_embeds": pooled, "time_ids": ids}
        return tiny_xl.unet(x[None], t, encoder_hidden_states=tokens, added_cond_kwargs=told).sample[0]

    with torch.no_grad():
        with task.student.active():
            found = strategy.losses(task, batch)
        erase, scope, retain = [], [], []
        for row, (x, t, prompt) in enumerate(zip(batch.x, batch.t, batch.prompts, strict=True)):
            own, null = (predict(x, t, text, [None, None]) for text in (prompt, None))
            vectors = [batch.extra[name][row, 0] if name in attacked and row < 2 else None
                       for name in ("text_encoder", "text_encoder_2")]  # fmt: skip
            with task.student.active():
                made = predict(x, t, prompt, vectors)
            wanted = null - 1.0 * (own - null) if row < 2 else own
            (erase if row < 2 else retain if row < 4 else scope).append((made - wanted).square().mean())
    assert float(found["erase"]) == pytest.approx(float(sum(erase) / 2), rel=1e-3)
    assert float(found["retain"]) == pytest.approx(2.0 * float(sum(retain) / 2), rel=1e-3)
    assert float(found["scope"]) == pytest.approx(0.5 * float(sum(scope) / 2), rel=1e-3)


# The released recipe -------------------------------------------------------------------------------------------------
