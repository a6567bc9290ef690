"""One-step generators on a pipeline: its sampler, what a call asks for in vain, and what they cannot be beside."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.artifact import CONFIG_FILE
from erasure.backbones import backbone_for
from erasure.errors import (
    ArtifactError,
    AttachError,
    OneStepWarning,
    UnsupportedModelError,
    VerificationError,
    WrongBaseError,
)
from erasure.training.generator import one_step

LEVEL = 700
CAT = Concept("cat", anchor="dog", retain=("house",))
QUICK: dict[str, Any] = {
    "steps": 2, "batch": 1, "retain_batch": 1, "contexts": 0, "retain_vocabulary": 1, "rank": 2, "lr": 1e-2,
    "level": LEVEL,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_pipe_original: Any) -> Erasure:
    return erasure.erase(tiny_pipe_original, CAT, "sfd", attach=False, progress=False, **QUICK)


@pytest.fixture(scope="module")
def of_many_steps(tiny_pipe_original: Any) -> Erasure:
    return erasure.erase(tiny_pipe_original, "house", "uce", attach=False, progress=False)


@pytest.fixture
def attached(tiny_pipe: Any, made: Erasure) -> Any:
    ErasureManager(tiny_pipe).add(made, "cat")
    return tiny_pipe


def draw(pipe: Any, **call: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a photo of a dog", generator=generator, output_type="latent", height=64, width=64, **call).images


def once(pipe: Any) -> Tensor:
    """With nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", OneStepWarning)
        return draw(pipe, num_inference_steps=1, guidance_scale=1.0)


def levels_asked(pipe: Any, **call: Any) -> list[float]:
    asked: list[float] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _unet, args: asked.append(float(args[1])))
    draw(pipe, **call)
    handle.remove()
    return asked


def test_the_picture_is_the_generators(attached: Any) -> None:
    """One pass at its level, from which the clean latents follow by hand."""
    backbone = backbone_for(attached)
    noise = torch.randn(1, *backbone.latents.shape(64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = one_step(backbone, noise, LEVEL, backbone.encode(["a photo of a dog"]))
    torch.testing.assert_close(once(attached), wanted)


def test_taking_it_off_restores_the_sampler_bit_for_bit(tiny_pipe: Any, made: Erasure) -> None:
    own, config = tiny_pipe.scheduler, copy.deepcopy(dict(tiny_pipe.scheduler.config))
    before, state = draw(tiny_pipe, num_inference_steps=3), {k: str(v) for k, v in vars(own).items()}
    listed = tiny_pipe.config["scheduler"]
    manager = ErasureManager(tiny_pipe)
    for take_off in (manager.unload, lambda: manager.delete("cat"), manager.disable):
        manager.add(made, "cat")
        assert tiny_pipe.scheduler is not own
        take_off()
        assert tiny_pipe.scheduler is own
        assert dict(own.config) == config
        assert {k: str(v) for k, v in vars(own).items()} == state
        assert tiny_pipe.config["scheduler"] == listed
        assert torch.equal(draw(tiny_pipe, num_inference_steps=3), before)
    manager.enable()
    assert tiny_pipe.scheduler is not own


@pytest.mark.parametrize("call", [
    {}, {"num_inference_steps": 25}, {"num_inference_steps": 1, "guidance_scale": 7.5},
    {"num_inference_steps": 25, "negative_prompt": "a car", "guidance_scale": 3.0},
], ids=str)  # fmt: skip
def test_what_a_call_asks_for_in_vain_warns_and_changes_nothing(attached: Any, call: dict[str, Any]) -> None:
    wanted = once(attached)
    with pytest.warns(OneStepWarning, match="one-step generator"):
        found = draw(attached, **call)
    torch.testing.assert_close(found, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert levels_asked(attached, **call) == [LEVEL]


def test_another_sampler_is_no_silent_mess(attached: Any, tiny_pipe_original: Any) -> None:
    manager = ErasureManager(attached)
    assert manager.verify()
    attached.scheduler = copy.deepcopy(tiny_pipe_original.scheduler)
    with pytest.raises(UnsupportedModelError, match="one-step generator that draws at noise level 700"):
        draw(attached, num_inference_steps=4)
    with pytest.raises(VerificationError, match="scheduler was replaced"):
        manager.verify()
    manager.adopt()
    assert torch.isfinite(once(attached)).all()
    assert manager.verify()


def test_pipelines_that_share_the_networks(tiny_pipe: Any, made: Erasure) -> None:
    manager, earlier = ErasureManager(tiny_pipe), StableDiffusionPipeline.from_pipe(tiny_pipe)
    before = draw(earlier, num_inference_steps=2)
    manager.add(made, "cat")
    later = StableDiffusionPipeline.from_pipe(tiny_pipe)
    assert torch.equal(once(later), once(tiny_pipe))
    with pytest.raises(UnsupportedModelError, match="another sampler"):
        draw(earlier, num_inference_steps=2)
    manager.unload()
    assert torch.equal(draw(earlier, num_inference_steps=2), before)
    with pytest.raises(UnsupportedModelError, match="taken off through another pipeline"):
        draw(later, num_inference_steps=2)
    later.scheduler = later.scheduler.replaced
    assert torch.equal(draw(later, num_inference_steps=2), before)


def test_nothing_else_edits_the_denoiser_beside_it(tiny_pipe: Any, made: Erasure, of_many_steps: Erasure) -> None:
    manager, own = ErasureManager(tiny_pipe), tiny_pipe.scheduler
    for first, second in ((made, of_many_steps), (of_many_steps, made), (made, made)):
        manager.add(first, "first")
        held = tiny_pipe.scheduler
        with pytest.raises(AttachError, match="one-step generator"):
            manager.add(second, "second")
        assert list(manager.erasures) == ["first"]
        assert tiny_pipe.scheduler is held
        manager.unload()
        assert tiny_pipe.scheduler is own
    # One of them off, the other can be attached; both cannot be chosen.
    manager.add(of_many_steps, "many")
    manager.set_erasures([])
    manager.add(made, "one")
    manager.set_erasures("one")
    with pytest.raises(AttachError, match="one-step generator"):
        manager.set_erasures(["many", "one"])
    assert manager.active_erasures() == ["one"]


def test_an_erasure_of_text_stands_beside_it(attached: Any) -> None:
    erasure.erase(attached, "house", "hirm", progress=False, steps=2)
    assert levels_asked(attached, num_inference_steps=1, guidance_scale=1.0) == [LEVEL]
    assert ErasureManager(attached).verify()


def test_the_stock_model_beside_it_is_sampled_as_before(attached: Any, tiny_pipe_original: Any) -> None:
    manager = ErasureManager(attached)
    stock, twin = manager.stock(), manager.twin()
    wanted = draw(tiny_pipe_original, num_inference_steps=2)
    torch.testing.assert_close(draw(stock, num_inference_steps=2), wanted)
    assert torch.equal(once(twin), once(attached))
    with manager.disabled():
        torch.testing.assert_close(draw(attached, num_inference_steps=2), wanted)
    again = copy.deepcopy(attached)
    assert torch.equal(once(again), once(attached))


def test_a_saved_pipeline_is_stock(attached: Any, tmp_path: Path) -> None:
    """Baked in, it draws the same with a scheduler of diffusers' own."""
    wanted = once(attached)
    attached.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(loaded.scheduler) is DDIMScheduler
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    torch.testing.assert_close(draw(loaded, num_inference_steps=1, guidance_scale=1.0), wanted, atol=1e-4, rtol=1e-4)


def test_a_file_says_how_it_is_sampled(made: Erasure, tiny_pipe: Any, tmp_path: Path) -> None:
    made.save(tmp_path)
    assert made.config.sampling == {"steps": 1, "guidance": 1, "level": LEVEL}
    loaded = erasure.load(tiny_pipe, tmp_path)
    assert loaded.config.sampling == made.config.sampling
    assert tiny_pipe.scheduler.timesteps.tolist() == [LEVEL]
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for wrong in ({"steps": 4}, {"guidance": 3}, {"level": 0}, {"level": "900"}, {"level": 1.5}, {"more": 1}):
        other = {**config, "sampling": {**config["sampling"], **wrong}}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(other))
        with pytest.raises(ArtifactError, match="sampling"):
            Erasure.load(tmp_path)
    config["sampling"] = {"steps": 1}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="sampling"):
        Erasure.load(tmp_path)


def test_a_level_that_the_model_lacks_is_refused(made: Erasure, tiny_pipe: Any) -> None:
    sampling = {"steps": 1, "guidance": 1, "level": 1000}
    other = Erasure(dataclasses.replace(made.config, sampling=sampling), made.edits)
    with pytest.raises(WrongBaseError, match="counts 0 to 999"):
        ErasureManager(tiny_pipe).add(other, "cat")
    assert not ErasureManager(tiny_pipe).erasures
