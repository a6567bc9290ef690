"""What ESD trains, counted on the shapes of Stable Diffusion 1.4."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DConditionModel

import erasure
from erasure import Concept
from erasure.backbones import Backbone, StableDiffusionBackbone, backbone_for
from erasure.errors import UnsupportedModelError
from erasure.strategies import get
from erasure.strategies.denoising import Method, trained_parameters
from erasure.training.student import LowRankStudent


@pytest.fixture(scope="module")
def full_size() -> Backbone:
    """The UNet of Stable Diffusion 1.x without its values."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
        )  # fmt: skip
    return StableDiffusionBackbone(SimpleNamespace(unet=unet))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "millions"), [("x", 43.963), ("x-strict", 19.169), ("u", 815.358), ("all", 859.321)]
)
def test_methods_train_what_the_released_code_does(full_size: Backbone, method: Any, millions: float) -> None:
    known = dict(full_size.denoiser.named_parameters())
    found = trained_parameters(full_size, method)
    assert len(set(found)) == len(found)
    assert sum(known[path].numel() for path in found) / 1e6 == pytest.approx(millions, abs=0.0005)


def test_methods_split_the_denoiser(tiny_pipe: Any) -> None:
    backbone = backbone_for(tiny_pipe)
    found: dict[str, set[str]] = {method: set(trained_parameters(backbone, method)) for method in get_args(Method)}
    assert found["x"] | found["u"] == found["all"]
    assert not found["x"] & found["u"]
    assert found["x-strict"] < found["x"]
    assert found["self"] < found["u"]
    assert all(".attn2." in path for path in found["x"])
    assert all(".attn1." in path for path in found["self"])
    assert found["text"] == found["entry"] == found["x-strict"]
    assert found["x+entry"] == found["x"]
    layers = {type(backbone.denoiser.get_submodule(path.rpartition(".")[0])) for path in found["all"]}
    assert layers == {torch.nn.Linear, torch.nn.Conv2d}


def test_the_pooled_door_of_sdxl_is_no_key_and_is_trained_on_its_own_columns(tiny_models: Any) -> None:
    pipe = tiny_models["stable-diffusion-xl"]()
    backbone = backbone_for(pipe)
    found = {method: trained_parameters(backbone, method) for method in get_args(Method)}
    door = "add_embedding.linear_1.weight"
    assert {method for method, paths in found.items() if door in paths} == {"u", "all", "text", "entry", "x+entry"}
    assert set(found["x-strict"]) == {path for path in found["entry"] if "add_embedding" not in path}
    assert all(path.endswith((".to_k.weight", ".to_v.weight")) for path in found["x-strict"])
    for rank, projection in ((0, 0.0), (4, 0.0), (4, 0.5)):
        made = erasure.erase(
            pipe, Concept("cat", anchor="dog"), "esd", method="entry", rank=rank, steps=2, batch=1, retain_batch=1,
            rollout_steps=2, contexts=0, retain_vocabulary=0, projection=projection, attach=False, progress=False,
        )  # fmt: skip
        key = f"unet/{door}" if rank == 0 else f"unet/{door.removesuffix('.weight')}"
        change = made.deltas[key].float() if rank == 0 else made.low_rank[key].down.float()
        assert change[:, :32].any()
        assert not change[:, 32:].any(), "columns that read sizes"


def test_fused_projections_are_refused(tiny_pipe: Any) -> None:
    tiny_pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        trained_parameters(backbone_for(tiny_pipe), "x")


def test_a_lora_takes_the_linear_layers(tiny_pipe: Any) -> None:
    backbone = backbone_for(tiny_pipe)
    strategy: Any = get("esd").configured(rank=4, method="all")
    student = strategy.student(backbone, backbone.towers[0], torch.Generator())
    assert isinstance(student, LowRankStudent)
    assert any(".ff." in path for path in student.paths)
    assert not any("conv" in path for path in student.paths)


@pytest.mark.parametrize("preset", get("esd").presets)
def test_presets_run(preset: str, tiny_pipe_original: Any) -> None:
    made = erasure.erase(
        tiny_pipe_original, Concept("cat", anchor="dog"), "esd", preset=preset, steps=1, rollout_steps=3,
        resolution=32, attach=False, progress=False,
    )  # fmt: skip
    assert made.deltas
    assert not made.low_rank
    assert made.config.cost["rollout_forwards"] == 0


def test_a_concept_is_gone_from_the_embedded_model_and_the_next_stays() -> None:
    """What the student is for: it predicts the target on the concept, and the teacher elsewhere."""
    pipe = erasure.load_pipeline("canvas-sd")
    made = erasure.erase(
        pipe, Concept("banana", anchor="pizza"), "esd", steps=60, lr=1e-3, contexts=0, retain_vocabulary=4,
        rollout_steps=4, attach=False, progress=False,
    )  # fmt: skip
    backbone = backbone_for(pipe)
    x, t = backbone.noise([1, 2, 3]), torch.tensor([900, 700, 500])
    manager = erasure.ErasureManager(pipe)

    def predict(prompt: str) -> torch.Tensor:
        with torch.no_grad():
            return backbone.predict(x, t, backbone.encode([prompt] * 3))

    own, anchor, other = (predict(f"a photo of a {word}") for word in ("banana", "pizza", "car"))
    manager.add(made, "banana")
    target = anchor - (own - anchor)
    assert (predict("a photo of a banana") - target).square().mean() < 0.6 * (own - target).square().mean()
    assert (predict("a photo of a car") - other).square().mean() < 0.1 * (own - target).square().mean()
