from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from erasure.backbones import Backbone, backbone_for
from erasure.errors import ConceptError, UnsupportedModelError


@pytest.fixture
def backbone(tiny_pipe: Any) -> Backbone:
    return backbone_for(tiny_pipe)


def test_the_family(tiny_pipe: Any, backbone: Backbone) -> None:
    assert backbone.family == "stable-diffusion"
    assert backbone.denoiser is tiny_pipe.unet
    assert backbone.dtype == torch.float32
    assert backbone.device == torch.device("cpu")


def test_a_compiled_pipeline_is_of_the_family(tiny_pipe: Any) -> None:
    tiny_pipe.unet = torch.compile(tiny_pipe.unet, backend="eager")
    assert backbone_for(tiny_pipe).family == "stable-diffusion"


def test_other_pipelines_are_refused(tiny_pipe: Any) -> None:
    two_encoders = {**tiny_pipe.components, "text_encoder_2": tiny_pipe.text_encoder}
    for parts in (two_encoders, {**tiny_pipe.components, "unet": None}, {"transformer": tiny_pipe.unet}):
        with pytest.raises(UnsupportedModelError, match=r"no supported family \(stable-diffusion, "):
            backbone_for(SimpleNamespace(components=parts))  # type: ignore[arg-type]


def with_scheduler(pipe: Any, prediction: str) -> Backbone:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    return backbone_for(pipe)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_to_x0_agrees_with_the_scheduler(tiny_pipe: Any, prediction: str) -> None:
    backbone = with_scheduler(tiny_pipe, prediction)
    assert backbone.parametrisation.name == prediction
    generator = torch.Generator().manual_seed(0)
    x_t, output = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    backbone.timesteps(10)
    for t in (1, 301, 901):
        wanted = tiny_pipe.scheduler.step(output, t, x_t).pred_original_sample
        torch.testing.assert_close(
            backbone.parametrisation.clean(output, x_t, torch.tensor([t])), wanted, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_to_x0_undoes_the_noising(tiny_pipe: Any, prediction: str) -> None:
    """Every row at its own level, against `add_noise` and `get_velocity`."""
    backbone = with_scheduler(tiny_pipe, prediction)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 16, 16, generator=generator) for _ in range(2))
    t = torch.tensor([3, 400, 800])
    x_t = tiny_pipe.scheduler.add_noise(clean, noise, t)
    truth = noise if prediction == "epsilon" else tiny_pipe.scheduler.get_velocity(clean, noise, t)
    torch.testing.assert_close(backbone.parametrisation.clean(truth, x_t, t), clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(backbone.parametrisation.noised(clean, noise, t), x_t)
    torch.testing.assert_close(backbone.parametrisation.target(clean, noise, t), truth)


def test_flow_is_not_of_this_family(tiny_pipe: Any) -> None:
    backbone = with_scheduler(tiny_pipe, "flow_prediction")
    with pytest.raises(UnsupportedModelError, match="'flow_prediction'; known: epsilon, v_prediction, sample"):
        _ = backbone.parametrisation


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@torch.no_grad()
def test_the_sampling_loop_is_the_pipelines(tiny_pipe: Any, scheduler: Any) -> None:
    tiny_pipe.scheduler = scheduler.from_config(tiny_pipe.scheduler.config)
    backbone = backbone_for(tiny_pipe)
    stock = tiny_pipe(
        "a photo of a cat", num_inference_steps=3, guidance_scale=4.0, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(11),
    ).images  # fmt: skip
    levels = backbone.timesteps(3)
    latents = backbone.noise([11], 32, 32)
    for t in levels:
        given = backbone.model_input(latents, t)
        negative = backbone.predict(given, t, backbone.encode([""]))
        positive = backbone.predict(given, t, backbone.encode(["a photo of a cat"]))
        latents = backbone.step(backbone.guided(positive, negative, 4.0), t, latents)
    torch.testing.assert_close(latents, stock, rtol=1e-4, atol=1e-4)


def test_noise_belongs_to_its_seed(backbone: Backbone) -> None:
    both = backbone.noise([3, 4])
    assert both.shape == (2, 4, 16, 16)
    assert torch.equal(both[1:], backbone.noise([4]))
    assert backbone.noise([3], 64, 32).shape == (1, 4, 32, 16)


@torch.no_grad()
def test_decode_is_the_pipelines(tiny_pipe: Any, backbone: Backbone) -> None:
    latents = backbone.noise([0])
    pixels = backbone.decode(latents)
    assert pixels.shape == (1, 3, 32, 32)
    stock = tiny_pipe.image_processor.postprocess(
        tiny_pipe.vae.decode(latents / tiny_pipe.vae.config.scaling_factor).sample, output_type="pt"
    )
    torch.testing.assert_close(pixels, stock)


@torch.no_grad()
def test_encode_is_the_pipelines(tiny_pipe: Any, backbone: Backbone) -> None:
    prompts = ["a photo of a cat", "", "van gogh " * 60]
    stock, _ = tiny_pipe.encode_prompt(prompts, "cpu", 1, False)
    made = backbone.encode(prompts)
    torch.testing.assert_close(made.tokens, stock, rtol=0, atol=0)
    assert made.pooled is None


def test_the_tower(tiny_pipe: Any, backbone: Backbone) -> None:
    (tower,) = backbone.towers
    assert tower.module is tiny_pipe.text_encoder
    assert len(tower.blocks) == 4
    assert tower.max_length == 77
    tokens = tower.tokenize(["a cat", ""])
    assert tokens.ids.shape == (2, 77)
    assert tokens.lengths == [4, 2]
    assert tower.key("encoder.layers.0") == "text_encoder/encoder.layers.0"
    tower.check_words("van gogh")
    with pytest.raises(ConceptError, match="no token"):
        tower.check_words("")
    with pytest.raises(ConceptError, match="unknown"):
        tower.check_words("猫")
    tower.check_words("cat 猫")


def test_encoding_is_differentiable(tiny_pipe: Any, backbone: Backbone) -> None:
    weight = tiny_pipe.text_encoder.encoder.layers[0].mlp.fc1.weight.requires_grad_()
    backbone.encode(["a cat"]).tokens.sum().backward()
    assert weight.grad is not None


@torch.no_grad()
def test_attention_sites_come_in_order_with_their_resolution(tiny_pipe: Any, backbone: Backbone) -> None:
    sites = backbone.attention_sites()
    order: list[str] = []
    tokens: dict[str, int] = {}
    handles = []
    for site in sites:

        def record(module: Any, args: Any, kwargs: Any, name: str = site.name) -> None:
            order.append(name)
            tokens[name] = (args[0] if args else kwargs["hidden_states"]).shape[1]

        handles.append(site.module.register_forward_pre_hook(record, with_kwargs=True))
    backbone.predict(torch.zeros(1, 4, 16, 16), torch.tensor(1), backbone.encode([""]))
    for handle in handles:
        handle.remove()
    assert [site.name for site in sites] == order
    assert len(order) == len(set(order)) == 2 * 4
    assert {site.kind for site in sites} == {"self", "cross"}
    assert {site.downsampling for site in sites} == {1, 2}
    for site in sites:
        assert tokens[site.name] == (16 // site.downsampling) ** 2, site.name
        assert site.module is tiny_pipe.unet.get_submodule(site.name)
        assert site.kind == ("cross" if site.module.is_cross_attention else "self")


def test_downsampling_of_a_four_level_unet(tiny_pipe: Any) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, cross_attention_dim=32, norm_num_groups=4,
        attention_head_dim=4,
    )  # fmt: skip
    pipe = copy.copy(tiny_pipe)
    pipe.register_modules(unet=unet)
    found = {site.name.split(".attentions")[0]: site.downsampling for site in backbone_for(pipe).attention_sites()}
    assert found == {
        "down_blocks.0": 1, "down_blocks.1": 2, "down_blocks.2": 4, "mid_block": 8, "up_blocks.1": 4, "up_blocks.2": 2,
        "up_blocks.3": 1,
    }  # fmt: skip


def test_entry_layers(tiny_pipe: Any, backbone: Backbone) -> None:
    layers = backbone.entry_layers()
    assert len(layers) == 8
    for layer in layers:
        assert tiny_pipe.unet.get_submodule(layer.key.removeprefix("unet/")) is layer.module
        assert layer.module.in_features == 32
        assert layer.source == "tokens"
    tiny_pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        backbone.entry_layers()
    tiny_pipe.unfuse_qkv_projections(vae=False)
    assert len(backbone.entry_layers()) == 8
