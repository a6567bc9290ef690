"""SFD: two players on one network, what it starts from, and what it is refused on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import erasure
from erasure import Concept, Erasure
from erasure.backbones import backbone_for
from erasure.carriers.edits import Edits, LowRank
from erasure.errors import OptionError, UnsupportedModelError
from erasure.strategies import get
from erasure.strategies.sfd import LORA_FILE
from erasure.training.run import Run
from erasure.training.trajectories import rolling_out

CAT = Concept("cat", anchor="dog", retain=("house",))
QUICK: dict[str, Any] = {
    "steps": 6, "batch": 2, "retain_batch": 2, "contexts": 0, "retain_vocabulary": 2, "rank": 2, "lr": 1e-2,
    "head_start": 0.2, "method": "x", "resolution": 16,
}  # fmt: skip


def make(pipe: Any, run: Run | None = None, progress: Any = False, **options: Any) -> Erasure:
    return erasure.erase(pipe, CAT, "sfd", attach=False, progress=progress, run=run, **{**QUICK, **options})


def tensors(made: Erasure) -> list[torch.Tensor]:
    found = made.edits.delta_state_dict() | made.edits.lora_state_dict()
    return [found[name] for name in sorted(found)]


def close(one: Erasure, other: Erasure) -> None:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


@pytest.fixture(scope="module")
def whole(tiny_pipe_original: Any) -> Erasure:
    return make(tiny_pipe_original)


@pytest.mark.parametrize("at", [1, 4], ids=["in the head start", "while both learn"])
def test_a_stopped_run_ends_with_the_same_bits(
    at: int, whole: Erasure, tiny_pipe_original: Any, tmp_path: Path
) -> None:
    run = Run(checkpoints=tmp_path, save_every=1)

    def stop(share: float) -> None:
        if round(share * QUICK["steps"]) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tiny_pipe_original, run, stop)
    resumed = make(tiny_pipe_original, run)
    assert all(map(torch.equal, tensors(resumed), tensors(whole)))
    assert resumed.config.cost["loss_fake_forget"] == whole.config.cost["loss_fake_forget"]
    assert resumed.config.cost["denoiser_forwards"] == whole.config.cost["denoiser_forwards"]


def test_parts_of_a_batch_are_one_batch(whole: Erasure, tiny_pipe_original: Any) -> None:
    close(whole, make(tiny_pipe_original, accumulation=2))


def test_checkpointing_runs_blocks_again_as_the_player_that_they_were(whole: Erasure, tiny_pipe_original: Any) -> None:
    saving = make(tiny_pipe_original, gradient_checkpointing=True)
    close(whole, saving)
    assert saving.config.cost["denoiser_forwards"] > whole.config.cost["denoiser_forwards"]


def test_passes_of_an_image(whole: Erasure) -> None:
    """Drawn and learned from: 3. The other model learns: 3. Both models of the generator's loss: 3 and, guided, 6.

    In the head start the generator learns from one picture of the stock model.
    """
    rows = QUICK["batch"] + QUICK["retain_batch"]
    first, both = 3 + 1 + 3, 3 + 3 + 3 + 6
    assert whole.config.cost["denoiser_forwards"] == rows * (1 * first + 5 * both)


def test_a_generator_that_waits(tiny_pipe_original: Any) -> None:
    made, rows = make(tiny_pipe_original, anchor_start=False), QUICK["batch"] + QUICK["retain_batch"]
    waiting, both = 1 + 3, 3 + 3 + 3 + 6
    assert made.config.cost["denoiser_forwards"] == rows * (1 * waiting + 5 * both)
    assert "loss_copied_forget" not in made.config.cost


def test_things_begin_as_copies_of_their_anchors_and_styles_do_not() -> None:
    cat, ink = Concept("cat", anchor="dog"), Concept("ink", kind="style", anchor="noto")
    strategy: Any = get("sfd")()
    assert strategy.beginning([cat]) == (True, 40)
    assert strategy.beginning([ink]) == strategy.beginning([cat, ink]) == (False, 9)
    chosen: Any = get("sfd").configured(steps=10, head_start=0.5, anchor_start=True)
    assert chosen.beginning([ink]) == (True, 5)


def test_the_generator_learns_to_draw_the_anchor_before_it_learns_to_draw(
    tiny_pipe_original: Any, tmp_path: Path
) -> None:
    """By copying what it starts as: the stock model, or another generator."""
    save_file(lora(tiny_pipe_original, 2), tmp_path / LORA_FILE)
    backbone = backbone_for(tiny_pipe_original)
    for start in ("", str(tmp_path)):
        strategy: Any = get("sfd").configured(**{**QUICK, "start": start})
        with rolling_out(backbone), torch.no_grad():
            task = strategy.task(backbone, backbone.reader, [CAT], 0, Accelerator(cpu=True))
            source, method = task.concept_states, task.method
            own = source.draw(["a house", "a dog"], [3, 4])
            torch.testing.assert_close(source.draw_as(method.first, ["a house", "a dog"], [3, 4]), own)
            method.generator.up[0].add_(0.1)
            assert not torch.allclose(source.draw(["a house", "a dog"], [3, 4]), own)
            torch.testing.assert_close(source.draw_as(method.first, ["a house", "a dog"], [3, 4]), own)


def test_a_model_is_left_as_it_was(tiny_pipe: Any, tensors_of: Any, changed_tensors: Any) -> None:
    before, scheduler = tensors_of(tiny_pipe), tiny_pipe.scheduler
    made = make(tiny_pipe, steps=2, rank=0)
    assert changed_tensors(before, tiny_pipe) == set()
    assert tiny_pipe.scheduler is scheduler
    assert made.deltas
    assert not made.low_rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_pipe: Any, dtype: torch.dtype) -> None:
    made = make(tiny_pipe.to(dtype), steps=3)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(made))
    assert made.config.cost["loss_fake_forget"] > 0


def test_the_teacher_is_asked_about_the_anchor(tiny_pipe_original: Any) -> None:
    """And where a concept has none, about no prompt; on prompts that must survive, about themselves."""
    backbone = backbone_for(tiny_pipe_original)
    strategy: Any = get("sfd").configured(**QUICK)
    for concept in (CAT, Concept("cat", retain=("house",))):
        with rolling_out(backbone):
            task = strategy.task(backbone, backbone.reader, [concept], 0, Accelerator(cpu=True))
        for scene in task.concept_states.scenes:
            wanted = scene.prompt.replace("cat", "dog") if concept.anchor else None
            assert scene.asks == (wanted,)
        assert all(not scene.asks for scene in task.retain_states.scenes)


# What it starts from -------------------------------------------------------------------------------------------------


def lora(pipe: Any, rank: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """A LoRA on one layer that the strategy trains."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    layer = pipe.unet.get_submodule(path)
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(rank, width or layer.in_features, generator=generator)
    up = torch.randn(layer.out_features, rank, generator=generator)
    return Edits({f"unet/{path}": LowRank(down, up)}).lora_state_dict(kohya=False)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_generator_begins_as_another_one(rank: int, tiny_pipe_original: Any, tmp_path: Path) -> None:
    """Drawn with diffusers' own LoRA; a higher rank leaves room."""
    pipe, backbone = tiny_pipe_original, backbone_for(tiny_pipe_original)
    save_file(lora(pipe, 2), tmp_path / LORA_FILE)
    for start in (str(tmp_path), str(tmp_path / LORA_FILE)):
        strategy: Any = get("sfd").configured(**{**QUICK, "rank": rank, "start": start})
        with rolling_out(backbone):
            task = strategy.task(backbone, backbone.reader, [CAT], 0, Accelerator(cpu=True))
            with torch.no_grad():
                found = task.concept_states.draw(["a house"], [3])
    with torch.no_grad():
        stock = task.concept_states.draw.__func__  # the method itself, drawn below without the student
        weights = lora(pipe, 2)
        down, up = (next(t for key, t in weights.items() if end in key) for end in ("lora_A", "lora_B"))
        layer = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_q")
        before = layer.weight.clone()
        layer.weight += up @ down
        task.concept_states.student = task.method.fake  # which changes nothing yet
        wanted = stock(task.concept_states, ["a house"], [3])
        layer.weight.copy_(before)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 1}, "'rank' is 1, and the LoRA to start from has 2"),
    ({"method": "self"}, "which is not trained"),
    ({"start": "nowhere"}, "there is no LoRA"),
    ({"start": "canvas-judge"}, "there is no LoRA"),
], ids=["rank", "layer", "missing", "not a LoRA"])  # fmt: skip
def test_a_start_that_cannot_be(
    options: dict[str, Any], message: str, tiny_pipe_original: Any, tmp_path: Path
) -> None:
    save_file(lora(tiny_pipe_original, 2), tmp_path / LORA_FILE)
    with pytest.raises(OptionError, match=message):
        make(tiny_pipe_original, **{"start": str(tmp_path), **options})


def test_a_start_for_another_model(tiny_pipe_original: Any, tmp_path: Path) -> None:
    save_file(lora(tiny_pipe_original, 2, width=5), tmp_path / LORA_FILE)
    with pytest.raises(OptionError, match="for another model"):
        make(tiny_pipe_original, start=str(tmp_path))
    save_file({"something": torch.zeros(2)}, tmp_path / LORA_FILE)
    with pytest.raises(OptionError, match="no LoRA of a one-step generator"):
        make(tiny_pipe_original, start=str(tmp_path))


# What it is refused on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "value"), [
    ("level", 1000), ("level", 0), ("levels", (20, 1001)), ("levels", (500, 500)), ("head_start", 1.0),
    ("retain_batch", 0), ("alpha", -1.0), ("betas", (0.0, 1.0)), ("fake_lr", 0.0),
])  # fmt: skip
def test_options_that_cannot_be(option: str, value: Any, tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match=repr(option)):
        make(tiny_pipe_original, **{option: value})


def test_a_start_needs_a_lora(tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match="raise 'rank'"):
        make(tiny_pipe_original, rank=0, start="canvas-turbo")


@pytest.mark.parametrize("family", ["flux", "stable-diffusion-3"])
def test_models_that_flow_are_refused(family: str, tiny_models: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="noise is that of flow matching"):
        make(tiny_models[family]())


def test_it_is_added_to_its_own_kind_alone(whole: Erasure, tiny_pipe_original: Any) -> None:
    def add(concept: Concept, strategy: str, to: Erasure, **options: Any) -> Erasure:
        return erasure.erase(
            tiny_pipe_original, concept, strategy, attach=False, progress=False, add_to=to, **options
        )  # fmt: skip

    house = Concept("car", anchor="dog", retain=("apple",))
    closed = add(house, "uce", erasure.erase(tiny_pipe_original, "cat", "uce", attach=False, progress=False))
    with pytest.raises(UnsupportedModelError, match="one-step generator"):
        add(Concept("apple", anchor="dog"), "sfd", closed, **QUICK)
    with pytest.raises(UnsupportedModelError, match="one-step generator"):
        add(house, "uce", whole)
    both = add(house, "sfd", whole)
    assert [concept.target for concept in both.concepts] == ["cat", "car"]
    assert both.config.sampling == whole.config.sampling
