"""Noised images of the model's own: their latents are a stock pipeline's, their states plain arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure.backbones import Backbone, backbone_for
from erasure.text.encodings import Reader
from erasure.training import storage
from erasure.training.cost import DenoiserCost
from erasure.training.images import LEVELS, NoisedImages
from erasure.training.states import Scene, stable_seed
from erasure.training.trajectories import Rollout, TrajectoryBuffer, rolling_out

SCENES = [Scene("a photo of a dog", ("a dog", None), instead="a photo of a cat"), Scene("a cat", ("a", "a dog"))]
ROLLOUT = Rollout(seeds=2, steps=3, guidance=3.0)
FAMILIES = ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux"]


def images_of(backbone: Backbone, scenes: list[Scene] = SCENES, rollout: Rollout = ROLLOUT, **options: Any) -> Any:
    every = [prompt for scene in scenes for prompt in (scene.prompt, scene.learned, *scene.asks)]
    prompts = Reader(backbone).read(["", *every])
    with rolling_out(backbone):
        return NoisedImages(backbone, scenes, prompts, rollout, 0, **options)


@pytest.fixture
def backbone(tiny_pipe: Any) -> Backbone:
    return backbone_for(tiny_pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_those_that_the_stock_pipeline_draws(tiny_models: Any, family: str) -> None:
    backbone = backbone_for(tiny_models[family]())
    source = images_of(backbone, rollout=Rollout(seeds=1, steps=3, guidance=1.0))
    with rolling_out(backbone):
        source.fill()
        pipe = backbone.pipe
        pipe.set_progress_bar_config(disable=True)
        noise = backbone.noise([source.noise_seed(0)])
        packed = getattr(pipe, "_pack_latents", None)
        given = packed(noise, 1, *noise.shape[1:]) if packed is not None else noise
        options = backbone.call_options(guidance=1.0, steps=3)
        drawn = pipe("a photo of a dog", latents=given, output_type="latent", **options).images
    wanted = packed(source.clean[:1], 1, *noise.shape[1:]) if packed is not None else source.clean[:1]
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_is_a_noised_image_and_what_the_teacher_says_there(tiny_models: Any, family: str) -> None:
    backbone = backbone_for(tiny_models[family]())
    source = images_of(backbone)
    with rolling_out(backbone):
        source.fill()
        levels = backbone.timesteps(LEVELS)
    number = source.per_scene + LEVELS + 123  # the second image of the second scene
    states = source.take(torch.tensor([number, 7]))
    assert states.scene.tolist() == [1, 0]
    assert states.t.tolist() == [levels[123], levels[7]]
    noise = backbone.noise([stable_seed(0, "noise", number)])
    wanted = backbone.parametrisation.noised(source.clean[3:4], noise, levels[123:124])
    torch.testing.assert_close(states.x[:1], wanted)

    def predicted(prompt: str | None, row: int) -> torch.Tensor:
        told = source.prompts([prompt])
        return backbone.predict(states.x[row : row + 1], states.t[row : row + 1], told, states.guidance[row : row + 1])

    with torch.no_grad():
        for row, scene in ((0, SCENES[1]), (1, SCENES[0])):
            torch.testing.assert_close(states.own[row], predicted(scene.prompt, row)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(states.unprompted[row], predicted(None, row)[0], rtol=1e-4, atol=1e-5)
            for place, ask in enumerate(scene.asks):
                torch.testing.assert_close(states.asked[row, place], predicted(ask, row)[0], rtol=1e-4, atol=1e-5)
    assert [scene.learned for scene in source.of(states)] == ["a cat", "a photo of a cat"]


def test_a_state_is_the_same_whenever_it_is_asked_for(backbone: Backbone) -> None:
    source = images_of(backbone)
    source.fill()
    first, again = source.take(torch.tensor([5, 900])), source.take(torch.tensor([900, 5]))
    assert torch.equal(first.x[0], again.x[1])
    assert not torch.equal(first.x[0], source.take(torch.tensor([6])).x[0])


def test_images_cost_their_rollout_once_and_states_what_they_ask(backbone: Backbone) -> None:
    cost = DenoiserCost()
    source = images_of(backbone, asks_null=False)
    with cost.counting(backbone.denoiser):
        source.fill()
        assert cost.forwards == 2 * 4 * 3  # with and without prompt, four images, three steps
        states = source.take(torch.tensor([1, 2, 3]))
    assert states.null is None
    assert cost.forwards == 24 + 3 * (1 + 2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_at_which_stored_trajectories_end_are_not_drawn_again(
    tiny_models: Any, family: str, guidance: float
) -> None:
    backbone, cost = backbone_for(tiny_models[family]()), DenoiserCost()
    rollout = Rollout(seeds=2, steps=3, guidance=guidance)
    alone = images_of(backbone, rollout=rollout)
    less = Rollout(seeds=1, steps=3, guidance=guidance)
    with rolling_out(backbone):
        alone.fill()
        known = TrajectoryBuffer(backbone, SCENES[1:], alone.prompts, less, 0)
        known.fill()
        source = images_of(backbone, rollout=rollout, stored=[known])
        with cost.counting(backbone.denoiser):
            source.fill()
    torch.testing.assert_close(source.clean, alone.clean, rtol=1e-4, atol=1e-4)
    # A model that is told its guidance stores predictions at other scales, from which no trajectory goes on.
    drawn = 4 if backbone.takes_guidance else 3
    assert cost.forwards == drawn * 3 * (1 if guidance == 1 or backbone.takes_guidance else 2)


@pytest.mark.parametrize("changed", [{"steps": 4}, {"guidance": 2.0}])
def test_trajectories_that_were_sampled_otherwise_are_not_taken(backbone: Backbone, changed: dict[str, Any]) -> None:
    source = images_of(backbone)
    with rolling_out(backbone):
        known = TrajectoryBuffer(backbone, SCENES, source.prompts, dataclasses.replace(ROLLOUT, **changed), 0)
        seeds = [known.noise_seed(0)]
        assert known.finished(seeds, known.rollout) == {}, "nothing is stored yet"
        known.fill()
        assert list(known.finished(seeds, known.rollout)) == seeds
        assert known.finished(seeds, ROLLOUT) == {}
        known.student = object()  # type: ignore[assignment]
        assert known.finished(seeds, known.rollout) == {}


def test_two_processes_share_the_work(backbone: Backbone) -> None:
    scenes = [Scene(f"a cat {number}") for number in range(12)]
    whole = images_of(backbone, scenes, Rollout(seeds=1, steps=2, guidance=1.0))
    whole.fill()
    parts = [
        images_of(backbone, scenes, Rollout(seeds=1, steps=2, guidance=1.0), share=(index, 2)) for index in range(2)
    ]
    for part in parts:
        part.fill()
    assert torch.equal(parts[0].clean + parts[1].clean, whole.clean)
    assert float(parts[0].clean[8:].abs().max()) == 0


def test_a_killed_run_draws_only_what_is_missing(backbone: Backbone, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path))
    scenes, rollout = [Scene(f"a cat {number}") for number in range(20)], Rollout(seeds=1, steps=2, guidance=1.0)
    killed, drawn = images_of(backbone, scenes, rollout), NoisedImages.drawn
    calls: list[int] = []

    def counted(self: NoisedImages, numbers: Any) -> torch.Tensor:
        calls.append(len(numbers))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return drawn(self, numbers)

    monkeypatch.setattr(NoisedImages, "drawn", counted)
    with pytest.raises(KeyboardInterrupt):
        storage.draw(killed, "model")
    again = images_of(backbone, scenes, rollout)
    storage.draw(again, "model")
    assert calls == [8, 8, 8, 4]
    whole = images_of(backbone, scenes, rollout)
    monkeypatch.setattr(NoisedImages, "drawn", drawn)
    whole.fill()
    assert torch.equal(again.clean, whole.clean)


@pytest.mark.parametrize("spoiled", ["nan", "shape", "name", "bytes"])
def test_a_file_that_is_none_of_it_is_made_anew(
    backbone: Backbone, tmp_path: Path, monkeypatch: Any, spoiled: str
) -> None:
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path))
    first = images_of(backbone)
    storage.draw(first, "model")
    (file,) = (tmp_path / "images").iterdir()
    clean = load_file(file)["clean"].clone()  # the file itself is about to be overwritten
    if spoiled == "bytes":
        file.write_bytes(b"no tensors")
    else:
        changed = {"nan": clean * torch.nan, "shape": clean[:, :1].contiguous(), "name": clean}[spoiled]
        save_file({"other" if spoiled == "name" else "clean": changed}, file)
    again = images_of(backbone)
    storage.draw(again, "model")
    assert torch.equal(again.clean, first.clean)
    torch.testing.assert_close(load_file(file)["clean"], clean)


def test_another_model_or_seed_has_other_files(backbone: Backbone, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path))
    storage.draw(images_of(backbone), "model")
    storage.draw(images_of(backbone), "another")
    storage.draw(images_of(backbone, rollout=Rollout(seeds=2, steps=4, guidance=3.0)), "model")
    assert len(list((tmp_path / "images").iterdir())) == 3
