"""Trajectories against the stock pipeline, separate evaluation, and the online reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from erasure.backbones import Backbone, Conditioning, StableDiffusionBackbone, backbone_for
from erasure.cache import cache_folder
from erasure.errors import TrainingError
from erasure.text.encodings import Reader
from erasure.training import storage
from erasure.training.cost import DenoiserCost
from erasure.training.states import Scene, States, StateSource, draw
from erasure.training.student import LowRankStudent
from erasure.training.trajectories import CHUNK, OnlineStates, Rollout, TrajectoryBuffer, rolling_out

SCENES = [Scene("a photo of a cat", ("a photo of a dog", "a photo of a")), Scene("a cat", ("a dog", "a"))]
ROLLOUT = Rollout(seeds=2, steps=5, guidance=3.0)


@pytest.fixture
def backbone(tiny_pipe: Any) -> Backbone:
    return backbone_for(tiny_pipe)


@pytest.fixture
def prompts(backbone: Backbone) -> Reader:
    return Reader(backbone).read(["", *(prompt for scene in SCENES for prompt in (scene.prompt, *scene.asks))])


def buffer_of(backbone: Backbone, prompts: Reader, rollout: Rollout = ROLLOUT, **options: Any) -> TrajectoryBuffer:
    made = TrajectoryBuffer(backbone, SCENES, prompts, rollout, 0, **options)
    with rolling_out(backbone):
        made.fill()
    return made


def all_of(source: StateSource) -> States:
    return source.take(torch.arange(len(source)))


def assert_equal(first: States, second: States) -> None:
    for name, a, b in zip(States._fields, first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("family", "prediction"),
    [("stable-diffusion", "epsilon"), ("stable-diffusion", "v_prediction"), ("stable-diffusion-xl", "epsilon")],
)
def test_a_trajectory_is_the_stock_pipeline_s(tiny_models: Any, family: str, prediction: str) -> None:
    """With the family's own input in the place of the empty prompt, which for SDXL is zeros."""
    tiny_pipe = tiny_models[family]()
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction)
    backbone = backbone_for(tiny_pipe)
    source = buffer_of(
        backbone, Reader(backbone).read(["", "a photo of a cat", "a cat", *SCENES[0].asks, *SCENES[1].asks])
    )
    seen: list[torch.Tensor] = []

    def note(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"].clone())
        return values

    noise = backbone.noise([source.noise_seed(0)])
    tiny_pipe(
        SCENES[0].prompt, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent",
        callback_on_step_end=note,
    )  # fmt: skip
    states = source.take(torch.arange(5))
    assert states.t.tolist() == backbone.timesteps(5).tolist()
    torch.testing.assert_close(states.x, torch.cat([noise, *seen[:-1]]), rtol=1e-4, atol=1e-4)


def test_predictions_are_those_of_separate_calls(backbone: Backbone, prompts: Reader) -> None:
    source = buffer_of(backbone, prompts)
    states = all_of(source)
    with torch.no_grad():
        for row in range(len(source)):
            scene = SCENES[int(states.scene[row])]
            assert scene is source.of(states)[row]
            asked = [scene.prompt, "", *scene.asks]
            wanted = torch.cat([
                backbone.predict(states.x[row : row + 1], states.t[row : row + 1], backbone.encode([prompt]))
                for prompt in asked
            ])  # fmt: skip
            found = torch.stack([states.own[row], states.null[row], *states.asked[row]])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_buffer_holds_what_online_rollouts_give(backbone: Backbone, prompts: Reader) -> None:
    buffered = buffer_of(backbone, prompts)
    online = OnlineStates(backbone, SCENES, prompts, ROLLOUT, 0)
    index = torch.tensor([0, 19, 7, 7, 12])
    with rolling_out(backbone):
        assert_equal(online.take(index), buffered.take(index))
    assert len(online) == len(buffered) == 20


def test_more_trajectories_than_a_chunk(backbone: Backbone, prompts: Reader) -> None:
    rollout = Rollout(seeds=CHUNK // 2 + 1, steps=2, guidance=3.0)
    buffered = buffer_of(backbone, prompts, rollout)
    online = OnlineStates(backbone, SCENES, prompts, rollout, 0)
    with rolling_out(backbone):
        assert_equal(all_of(online), all_of(buffered))


def test_two_processes_share_the_work(backbone: Backbone, prompts: Reader) -> None:
    """Each one rolls every other chunk out; added up, they are the buffer of a single process."""
    rollout = Rollout(seeds=CHUNK, steps=2, guidance=3.0)
    whole = all_of(buffer_of(backbone, prompts, rollout))
    halves = [all_of(buffer_of(backbone, prompts, rollout, share=(rank, 2))) for rank in range(2)]
    assert all(not torch.equal(half.x, whole.x) for half in halves)
    assert all(
        torch.equal(a + b, c) for a, b, c in zip(*(part.parts().values() for part in (*halves, whole)), strict=True)
    )


def test_a_student_s_rollouts_keep_the_teacher_s_predictions(backbone: Backbone, prompts: Reader) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    student = LowRankStudent(backbone.denoiser, [path], 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.up[0].fill_(1.0)
    stock, led = buffer_of(backbone, prompts), buffer_of(backbone, prompts, student=student)
    first, later = torch.arange(0, 20, 5), torch.arange(4, 20, 5)
    assert_equal(led.take(first), stock.take(first))
    assert not torch.allclose(led.take(later).x, stock.take(later).x, atol=1e-3)
    online = OnlineStates(backbone, SCENES, prompts, ROLLOUT, 0, student=student)
    with rolling_out(backbone):
        assert_equal(online.take(later), led.take(later))
    states = led.take(later[:1])
    with torch.no_grad():
        wanted = backbone.predict(states.x, states.t, backbone.encode([SCENES[0].prompt]))
    torch.testing.assert_close(states.own, wanted)


class Distilled(StableDiffusionBackbone):
    """A model that was distilled for guidance without any error: it answers `v0 + g (v - v0)` when it is told g."""

    takes_guidance = True

    def predict(self, x_t: Any, t: Any, conditioning: Conditioning, guidance: Any = None) -> torch.Tensor:
        scale = torch.as_tensor(1.0 if guidance is None else guidance).expand(len(x_t)).view(-1, 1, 1, 1)
        plain = super().predict(x_t, t, conditioning)
        null = super().predict(x_t, t, self.encode([""]).repeated(len(x_t)))
        return null + scale * (plain - null)


@torch.no_grad()
def test_a_model_that_is_told_its_guidance_takes_one_pass_a_step(tiny_pipe: Any) -> None:
    """Its trajectories are those of two passes, and each state has predictions at one of the scales."""
    two, one = StableDiffusionBackbone(tiny_pipe), Distilled(tiny_pipe)
    read = ["", *(prompt for scene in SCENES for prompt in (scene.prompt, *scene.asks))]
    told = Rollout(seeds=2, steps=5, guidance=3.0, trained_guidance=(1.0, 3.0))
    wanted, found = (
        all_of(buffer_of(two, Reader(two).read(read))),
        all_of(buffer_of(one, Reader(one).read(read), told)),
    )
    for name in ("x", "t", "scene"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)
    assert set(found.guidance.tolist()) == {1.0, 3.0}
    assert set(wanted.guidance.tolist()) == {1.0}
    scale = found.guidance.view(-1, 1, 1, 1)
    torch.testing.assert_close(found.null, wanted.null, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.own, wanted.null + scale * (wanted.own - wanted.null), rtol=1e-3, atol=1e-4)
    asked = wanted.null[:, None] + scale[:, None] * (wanted.asked - wanted.null[:, None])
    torch.testing.assert_close(found.asked, asked, rtol=1e-3, atol=1e-4)
    online = OnlineStates(one, SCENES, Reader(one).read(read), told, 0)
    some = torch.tensor([0, 19, 7])
    with rolling_out(one):
        assert_equal(online.take(some), found.rows(some))


def test_a_step_without_guidance_takes_one_pass(backbone: Backbone, prompts: Reader) -> None:
    cost = DenoiserCost()
    with cost.counting(backbone.denoiser):
        made = buffer_of(backbone, prompts, Rollout(seeds=1, steps=3, guidance=1.0))
        # A pass for the step, one without a prompt, and two for what is asked besides.
        assert cost.forwards == 2 * 3 * (1 + 1 + 2)
        with rolling_out(backbone):
            cost.forwards = 0
            OnlineStates(backbone, SCENES, prompts, made.rollout, 0).take(torch.tensor([2]))
        assert cost.forwards == 3 + 1 + 2
    states = all_of(made)
    with torch.no_grad():
        null = backbone.predict(states.x, states.t, prompts.null(6))
    torch.testing.assert_close(states.null, null, rtol=1e-5, atol=1e-5)


def test_the_size_is_a_part_of_the_recipe(tiny_pipe: Any) -> None:
    """Trajectories of another size are others."""
    recipes = []
    for size in (None, (48, 32)):
        backbone = backbone_for(tiny_pipe, size=size)
        recipes.append(TrajectoryBuffer(backbone, SCENES, Reader(backbone), ROLLOUT, 0).recipe()["session"])
    assert recipes == [
        {"latents": [4, 16, 16], "tokens": {"text_encoder": 77}},
        {"latents": [4, 24, 16], "tokens": {"text_encoder": 77}},
    ]


def test_noise_belongs_to_the_prompt(backbone: Backbone, prompts: Reader) -> None:
    both = OnlineStates(backbone, SCENES, prompts, ROLLOUT, 0)
    alone = OnlineStates(backbone, SCENES[1:], prompts, ROLLOUT, 0)
    assert [alone.noise_seed(i) for i in range(2)] == [both.noise_seed(i) for i in (2, 3)]
    assert len({both.noise_seed(i) for i in range(4)}) == 4
    assert OnlineStates(backbone, SCENES, prompts, ROLLOUT, 1).noise_seed(0) != both.noise_seed(0)


def test_the_cost_of_a_buffer_and_of_online_states(backbone: Backbone, prompts: Reader) -> None:
    cost = DenoiserCost()
    with cost.counting(backbone.denoiser):
        buffer_of(backbone, prompts)
        assert cost.forwards == 4 * 5 * (2 + 2)
        cost.forwards = 0
        with rolling_out(backbone):
            OnlineStates(backbone, SCENES, prompts, ROLLOUT, 0).take(torch.tensor([3, 10]))
        # Four states of one trajectory and one of another; each state that is kept is asked twice more.
        assert cost.forwards == 4 * 2 + 1 * 2 + 2 * 2


def test_backward_counts_twice_and_nothing_while_paused(backbone: Backbone, prompts: Reader) -> None:
    cost = DenoiserCost()
    with cost.counting(backbone.denoiser):
        text = Conditioning(prompts(["a cat", "a dog"]).tokens.requires_grad_())
        made = backbone.predict(torch.randn(2, 4, 16, 16), torch.tensor([5, 9]), text)
        assert cost.forwards == 2
        made.sum().backward()
        assert cost.forwards == 6
        with cost.paused():
            backbone.predict(torch.randn(2, 4, 16, 16), torch.tensor([5, 9]), text)
    backbone.predict(torch.randn(2, 4, 16, 16), torch.tensor([5, 9]), text)
    assert cost.forwards == 6


def test_rolling_out_leaves_the_pipeline_s_scheduler_alone(backbone: Backbone, prompts: Reader) -> None:
    backbone.pipe.scheduler.set_timesteps(7)
    before = backbone.pipe.scheduler
    buffer_of(backbone, prompts)
    assert backbone.pipe.scheduler is before
    assert len(before.timesteps) == 7


# On disk -------------------------------------------------------------------------------------------------------------


def test_the_next_training_finds_them(backbone: Backbone, prompts: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, cost = Accelerator(cpu=True), DenoiserCost()

    def fill(seed: int = 3, model: str = "model") -> tuple[States, int]:
        made = TrajectoryBuffer(backbone, SCENES, prompts, ROLLOUT, seed)
        cost.forwards = 0
        with rolling_out(backbone), cost.counting(backbone.denoiser):
            storage.fill(made, model, accelerator)
        return all_of(made), cost.forwards

    first, full = fill()
    again, none = fill()
    assert full > 0
    assert none == 0
    assert all(torch.equal(a, b) for a, b in zip(first.parts().values(), again.parts().values(), strict=True))
    assert fill(seed=4)[1] == fill(model="other")[1] == full
    files = list((cache_folder() / "trajectories").glob("*.safetensors"))
    for file in files:
        file.write_bytes(b"broken")
    assert fill()[1] == full
    monkeypatch.setattr(storage, "LIMIT", 0)
    fill(seed=5)
    assert len(list((cache_folder() / "trajectories").glob("*.safetensors"))) == 1


def test_no_room_for_them_is_no_obstacle(
    backbone: Backbone, prompts: Reader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    made = TrajectoryBuffer(backbone, SCENES, prompts, ROLLOUT, 0)
    with rolling_out(backbone):
        storage.fill(made, "model", Accelerator(cpu=True))
    assert len(all_of(made).x) == 20


def test_draws_follow_from_their_seed_alone() -> None:
    first = draw(1000, 50, 0, "concept", 7)
    torch.manual_seed(5)
    assert torch.equal(first, draw(1000, 50, 0, "concept", 7))
    assert not torch.equal(first, draw(1000, 50, 0, "concept", 8))
    assert not torch.equal(first, draw(1000, 50, 1, "concept", 7))
    assert int(first.max()) < 1000


def test_what_a_training_cost_adds_up_over_its_sessions() -> None:
    first = DenoiserCost()
    first.begin("rollout")
    first.forwards = 5
    first.begin("update")
    first.forwards = 12
    state = first.state_dict()
    assert state["rollout_forwards"] == 5
    second = DenoiserCost()
    second.begin("rollout")
    second.forwards = 2  # rolled out again
    second.begin("update")
    second.load_state_dict(state)
    second.forwards += 4
    assert (second.forwards, second.rollout_forwards, second.sessions) == (18, 7, 2)
    assert second.earlier_seconds == sum(state[f"{phase}_seconds"] for phase in ("setup", "rollout", "update"))
    assert sum(second.seconds.values()) > second.earlier_seconds
    third = DenoiserCost()
    third.load_state_dict(second.state_dict())
    assert (third.forwards, third.sessions) == (18, 3)
    assert third.earlier_seconds >= second.earlier_seconds
    with pytest.raises(TrainingError, match="delete it"):
        DenoiserCost().load_state_dict(state | {"forwards": "many"})  # type: ignore[arg-type]
