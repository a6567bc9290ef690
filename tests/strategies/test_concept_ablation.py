"""Concept Ablation against the plain arithmetic of its paper, and which anchors it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import erasure
from erasure import Concept
from erasure.backbones import backbone_for
from erasure.errors import ConceptError, OptionError
from erasure.strategies import get
from erasure.strategies.denoising import trained_parameters
from erasure.strategies.prompts import anchored
from erasure.training.images import LEVELS
from erasure.training.states import Scene, stable_seed
from tests.strategies.test_trained_families import velocity
from tests.strategies.updates import first_update

CAT = Concept("cat", anchor="dog")
QUICK: dict[str, Any] = {
    "batch": 3, "retain_batch": 2, "rollout_steps": 3, "contexts": 0, "retain_vocabulary": 0, "templates": False,
}  # fmt: skip
NOISE: dict[str, Any] = {"retain_form": "anchors", "retain_target": "noise"}


def trained(pipe: Any, name: str = "concept_ablation", **options: Any) -> tuple[Any, Any, Any]:
    """A strategy, a training of it whose student differs from the stock model, and its first batch."""
    strategy: Any = get(name).configured(**{**QUICK, **options})
    backbone = backbone_for(pipe)
    return strategy, *first_update(strategy, backbone, CAT)


def predicted(pipe: Any, x: Tensor, t: Tensor, prompt: str, guidance: Tensor) -> Tensor:
    """What the denoiser says of one state, called plainly: `(channels, h, w)`."""
    if not hasattr(pipe, "unet"):
        return velocity(pipe, x, t, prompt, guidance)
    told = pipe.encode_prompt(prompt, pipe.device, 1, False)[0]
    return pipe.unet(x[None], t, encoder_hidden_states=told).sample[0]


@torch.no_grad()
@pytest.mark.parametrize("prior", [{}, NOISE], ids=["ours", "paper"])
@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-3", "flux"])
def test_an_update_is_plain_arithmetic(tiny_models: Any, family: str, prior: dict[str, Any]) -> None:
    """`|e_student(x_t, c) - e(x_t, a)|^2 + w |e_student(x'_t, r) - target|^2` on images of the anchor."""
    pipe = tiny_models[family]()
    told = {"trained_guidance": (1.0,)} if prior and family == "flux" else {}
    strategy, task, batch = trained(pipe, retain_weight=2.0, **prior, **told)
    assert batch.prompts[:3] == ["cat"] * 3
    with task.student.active():
        found = strategy.losses(task, batch)
    erase, retain = [], []
    for row, (x, t, g, prompt) in enumerate(zip(batch.x, batch.t, batch.guidance, batch.prompts, strict=True)):
        with task.student.active():
            made = predicted(pipe, x, t, prompt, g)
        if row < 3:
            erase.append((made - predicted(pipe, x, t, "dog", g)).square().mean())
        else:
            wanted = batch.retained.truth[row - 3] if prior else predicted(pipe, x, t, prompt, g)
            retain.append((made - wanted).square().mean())
    assert float(found["erase"]) == pytest.approx(float(sum(erase) / 3), rel=1e-3)
    assert float(found["retain"]) == pytest.approx(2.0 * float(sum(retain) / 2), rel=1e-3)
    assert set(batch.prompts[3:]) == ({"dog"} if prior else {""})


@torch.no_grad()
@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_the_noise_in_an_image_is_what_a_perfect_denoiser_predicts(tiny_models: Any, family: str) -> None:
    pipe = tiny_models[family]()
    _, task, _ = trained(pipe)
    source, number = task.concept_states, 2 * LEVELS // 5
    states = source.take(torch.tensor([number]))
    noise, clean = task.backbone.noise([stable_seed(0, "noise", number)]), source.clean[:1]
    if family == "flux":
        share = states.t.view(-1, 1, 1, 1) / 1000
        mixed, target = (1 - share) * clean + share * noise, noise - clean
    else:
        kept = pipe.scheduler.alphas_cumprod[states.t.long()].view(-1, 1, 1, 1)
        mixed, target = kept.sqrt() * clean + (1 - kept).sqrt() * noise, noise
    torch.testing.assert_close(states.x, mixed)
    torch.testing.assert_close(states.noised, target)


def test_images_cost_a_pass_of_the_teacher_and_none_without_a_prompt(tiny_pipe_original: Any) -> None:
    made = erasure.erase(
        tiny_pipe_original, CAT, "concept_ablation", attach=False, progress=False, steps=2, seed=5, **QUICK
    )
    cost = made.config.cost
    assert cost["denoiser_forwards"] - cost["rollout_forwards"] == 2 * 5 * (3 + 1)
    kept = erasure.erase(
        tiny_pipe_original, CAT, "concept_ablation", attach=False, progress=False, steps=2, seed=5, **QUICK,
        states="buffer",
    ).config.cost  # fmt: skip
    assert kept["denoiser_forwards"] - kept["rollout_forwards"] == 2 * 5 * 3


# Anchors -------------------------------------------------------------------------------------------------------------


def test_scenes_are_the_anchor_s_and_the_concept_is_learned_there(tiny_pipe: Any) -> None:
    tower, strategy = backbone_for(tiny_pipe).reader, get("concept_ablation").configured(contexts=2)
    scenes: list[Scene] = strategy.scenes(tower, [CAT, Concept("monet", kind="style", anchor="")], 0)  # type: ignore[attr-defined]
    assert Scene("a photo of a dog", instead="a photo of a cat") in scenes
    assert Scene("in style", instead="in monet style") in scenes
    assert len(scenes) > 10
    assert all(scene.learned != scene.prompt for scene in scenes)


@pytest.mark.filterwarnings("ignore::erasure.errors.ConceptWarning")
@pytest.mark.parametrize("name", ["concept_ablation", "doco"])
def test_a_concept_without_an_anchor_is_refused(tiny_pipe_original: Any, name: str) -> None:
    for concepts, reason in (
        ("cat", "it has none"),
        ([CAT, "house"], "'house' is asked for, and it has none"),
        ([CAT, Concept("dog", anchor="cat")], "its anchor 'dog' is to be erased as well"),
    ):
        with pytest.raises(ConceptError, match=f"{name} teaches the model .*{reason}: name what shall take its place"):
            erasure.erase(tiny_pipe_original, concepts, name, attach=False, progress=False)


def test_of_an_anchor_that_is_erased_as_well_its_own_takes_the_place(tiny_pipe: Any) -> None:
    tower = backbone_for(tiny_pipe).reader
    found = anchored(tower, [CAT, Concept("dog", anchor="house"), Concept("car", anchor="")], "it")
    assert [concept.anchor for concept in found] == ["house", "house", ""]


# Options -------------------------------------------------------------------------------------------------------------


def test_presets_train_keys_and_values_in_full(tiny_pipe: Any) -> None:
    for name in ("concept_ablation", "doco"):
        for preset in get(name).presets:
            strategy: Any = get(name).configured(preset)
            chosen = trained_parameters(backbone_for(tiny_pipe), strategy.method)
            every = {path for path, _ in tiny_pipe.unet.named_parameters()}
            assert set(chosen) == {path for path in every if "attn2.to_k" in path or "attn2.to_v" in path}
            assert strategy.rank == 0
            assert (strategy.descent.betas, strategy.descent.eps) == ((0.9, 0.999), 1e-8)
            images = {"paper": 1000, "released": 200, "released-prior": 200}
            assert strategy.rollouts * (5 + strategy.contexts) == (1000 if name == "doco" else images[preset])


def test_what_cannot_be_is_refused(tiny_models: Any) -> None:
    with pytest.raises(OptionError, match="'teacher' unless 'states' is 'images'"):
        get("concept_ablation").configured(retain_target="noise", states="buffer")
    with pytest.raises(OptionError, match="'teacher' for images"):
        get("concept_ablation").configured(rollout_by="student")
    strategy: Any = get("concept_ablation").configured(retain_target="noise")
    flux = backbone_for(tiny_models["flux"]())
    with pytest.raises(OptionError, match=r"guidance of \(1.0, 3.0\), unless 'trained_guidance' is \(1.0,\)"):
        strategy.scales(flux)
    assert get("concept_ablation").configured(**NOISE).ignores_retain() == "retain_form"
