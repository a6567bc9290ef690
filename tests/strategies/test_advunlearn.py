"""AdvUnlearn: each thing that the released code has wrong, shown right here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import erasure
from erasure import Concept
from erasure.backbones import TextTower, backbone_for, text_towers
from erasure.errors import ConceptError, DivergenceError, NoMatchingModuleError, OptionError
from erasure.strategies import get
from erasure.training.attack import attacked, prefixed, random_words, vocabulary_spread

CAT = Concept("cat", anchor="dog")
QUICK: dict[str, Any] = {
    "steps": 4, "batch": 2, "retain_batch": 2, "rollout_steps": 3, "contexts": 0, "retain_vocabulary": 2,
    "attack_steps": 2, "attack_from": 0.0,
}  # fmt: skip


def make(pipe: Any, **options: Any) -> erasure.Erasure:
    return erasure.erase(pipe, CAT, "advunlearn", attach=False, progress=False, **{**QUICK, **options})


@pytest.fixture
def tower(tiny_pipe_original: Any) -> TextTower:
    return backbone_for(tiny_pipe_original).towers[0]


# The attack ----------------------------------------------------------------------------------------------------------


def quadratic(goal: Tensor) -> Any:
    return lambda vectors, step: ((vectors - goal) * (1 + 0.1 * step)).square().sum()


def test_every_step_has_a_gradient_of_its_own() -> None:
    """Adam written out, with no gradient carried from step to step, and the vectors after the last step."""
    goal, start = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.0, 3.0]]])
    found = attacked(quadratic(goal), start, steps=5, lr=0.2, signed=False)
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
    found = attacked(quadratic(goal), start, steps=1, lr=0.5, signed=True)
    assert found.tolist() == [[[0.5, 2.5]]]
    assert start.tolist() == [[[0.0, 3.0]]]


def test_nan_in_the_attack_is_an_error() -> None:
    with pytest.raises(DivergenceError, match="its step 0"):
        attacked(lambda vectors, step: vectors.sum() * torch.nan, torch.zeros(1, 1, 2), steps=2, lr=1, signed=False)


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


def test_a_tokeniser_without_room_is_refused(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erasure.training.attack.FILLER", "zz")
    with pytest.raises(ConceptError, match="leaves no room"):
        prefixed(tower, ["cat"], 1)


def test_the_adversary_starts_from_words(tower: TextTower) -> None:
    table = tower.root.embeddings.token_embedding.weight
    found = random_words(tower, 3, 2, torch.Generator().manual_seed(0))
    assert found.shape == (3, 2, 32)
    assert all((table == row).all(1).any() for row in found.flatten(0, 1))
    assert vocabulary_spread(tower) == pytest.approx(float(table.std(0).mean()))


def test_the_attack_lowers_its_loss_and_is_resisted(tiny_pipe: Any) -> None:
    """The inner loop finds vectors that are closer to drawing the concept than those it starts from."""
    from functools import partial

    from accelerate import Accelerator

    from erasure.training.loop import Share

    strategy: Any = get("advunlearn").configured(**{**QUICK, "attack_steps": 20, "attack_lr": 1.0})
    backbone = backbone_for(tiny_pipe)
    task = strategy.task(backbone, backbone.towers[0], [CAT], 0, Accelerator(cpu=True))
    from erasure.training.states import rolling_out

    with rolling_out(backbone):
        task.concept_states.fill()
        task.retain_states.fill()
        with torch.no_grad():
            for up in task.student.up:
                up.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        share = Share(0, 1)
        batch = strategy.prepare(task, 0, share)
        loss = partial(strategy.attack_loss, task, 0, share, batch.prompts[:2], batch.concept.scene)
        start = random_words(task.tower, 2, 1, torch.Generator().manual_seed(1))
        with task.student.active(), torch.no_grad():
            ahead, reached = (sum(float(loss(vectors, turn)) for turn in range(8)) for vectors in (start, batch.extra))
    assert reached < ahead
    assert all(parameter.grad is None for parameter in task.student.parameters())


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
        retain_vocabulary=0, attach=False, progress=False,
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
        "retain_batch": whole.retain_batch, "retain_vocabulary": 0,
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
