"""Attention control beside what else is done to pipelines: offloading, compiling, adapters, other backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from erasure.backbones import attention_sites
from erasure.carriers.attention import AttentionController, Layout
from erasure.carriers.guidance import BranchGuidance
from erasure.pipelines import StableDiffusionAStarPipeline, StableDiffusionObjectRemovalPipeline

Draw = Callable[..., Tensor]


def remove(base: Any, **options: Any) -> Tensor:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    mask = np.zeros((32, 32), dtype=bool)
    mask[8:20, 8:20] = True
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 4, "output_type": "pt", "generator": generator}
    return pipe(image, mask, **settings | options).images


def compose(base: Any, **options: Any) -> Tensor:
    pipe = StableDiffusionAStarPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 4, "output_type": "pt", "generator": generator, "height": 32, "width": 32}
    return pipe("a cat and a dog", subjects=["cat", "dog"], step_size=50.0, **settings | options).images


@pytest.fixture(params=[remove, compose])
def run(request: pytest.FixtureRequest) -> Draw:
    return request.param


def test_under_model_offload(run: Draw, tiny_pipe: Any) -> None:
    wanted = run(tiny_pipe)
    tiny_pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(run(tiny_pipe), wanted)


@pytest.mark.compile
@pytest.mark.parametrize(("run", "in_place"), [(remove, True), (compose, False)])
def test_with_a_compiled_denoiser(run: Draw, tiny_pipe: Any, in_place: bool, draw: Any) -> None:
    """Tracing takes seconds, so that each way to compile has one of the two pipelines."""
    torch.compiler.reset()
    wanted, plain = run(tiny_pipe), draw(tiny_pipe)
    if in_place:
        tiny_pipe.unet.compile(backend="eager")
    else:
        tiny_pipe.unet = torch.compile(tiny_pipe.unet, backend="eager")
    torch.testing.assert_close(draw(tiny_pipe), plain)
    torch.testing.assert_close(run(tiny_pipe), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(draw(tiny_pipe), plain)


def test_beside_an_ip_adapter(run: Draw, tiny_pipe: Any, load_tiny_ip_adapter: Any) -> None:
    without = run(tiny_pipe)
    before = load_tiny_ip_adapter(tiny_pipe)
    guided = {"guidance_scale": 3.0, "ip_adapter_image_embeds": [torch.ones(2, 1, 16)]}
    first = run(tiny_pipe, **guided)
    other = run(tiny_pipe, **guided | {"ip_adapter_image_embeds": [-torch.ones(2, 1, 16)]})
    assert tiny_pipe.unet.attn_processors == before
    assert not torch.equal(first, without)
    assert not torch.equal(first, other)


def test_beside_a_lora(run: Draw, tiny_pipe: Any) -> None:
    from peft import LoraConfig

    without = run(tiny_pipe)
    torch.manual_seed(0)
    tiny_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_it = run(tiny_pipe)
    assert not torch.equal(with_it, without)
    tiny_pipe.unet.fuse_lora()
    torch.testing.assert_close(run(tiny_pipe), with_it, atol=1e-3, rtol=1e-3)


def test_with_fused_projections(run: Draw, tiny_pipe: Any) -> None:
    wanted = run(tiny_pipe)
    tiny_pipe.fuse_qkv_projections()
    torch.testing.assert_close(run(tiny_pipe), wanted, atol=1e-4, rtol=1e-4)
    tiny_pipe.unfuse_qkv_projections()
    torch.testing.assert_close(run(tiny_pipe), wanted, atol=1e-4, rtol=1e-4)


def test_residuals_of_a_controlnet_reach_both_branches(tiny_pipe: Any) -> None:
    """Shared trunk and whole branches, with residuals as a ControlNet gives them."""
    unet = tiny_pipe.unet
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    seen: list[tuple[int, ...]] = []
    for block in unet.down_blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend(part.shape for part in out[1]))
    mid: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda _, args, out: mid.append(out))
    first = unet.conv_in(latents)
    unet(latents, torch.tensor(9), text)
    residuals = {
        "down_block_additional_residuals": tuple(torch.randn(shape) for shape in (first.shape, *seen)),
        "mid_block_additional_residual": torch.randn(mid[0].shape),
    }
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, 3:9, 3:9] = True
    sites = [site for site in attention_sites(unet) if site.kind == "self" and site.name.startswith("up_")]

    def guided(shared: bool, **given: Any) -> Tensor:
        control = AttentionController(unet, Layout((16, 16), 2, branches=2, changed=(1,)))
        control.drop_keys(mask, sites, query_scale=0.3, scale_until=0.5)
        with control, BranchGuidance(unet, 5.0, shared_trunk=shared):
            return unet(latents, torch.tensor(9), text, return_dict=False, **given)[0]

    shared, whole = (guided(flag, **residuals) for flag in (True, False))
    assert (shared - whole).abs().max() < 1e-4
    assert (shared - guided(True)).abs().max() > 1e-2


def test_the_users_backend_is_respected(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import attention_backend
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    calls: list[int] = []
    native = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return native(*args, **kwargs)

    wanted = remove(tiny_pipe)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, watch)
    with attention_backend("_native_math"):
        torch.testing.assert_close(remove(tiny_pipe), wanted, atol=1e-4, rtol=1e-4)
    assert calls
