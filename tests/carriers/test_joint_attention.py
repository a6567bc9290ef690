"""Attention over image and text at once, against materialised matrices: reference images, sizes, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.backbones import attention_sites
from erasure.carriers.attention import AttentionController, Layout, to_grid
from erasure.errors import UnsupportedModelError

H, W = 12, 8
TOKENS = H * W // 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def square() -> Tensor:
    mask = torch.zeros(1, H, W, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    return mask


@pytest.fixture(params=["sd3", "flux"])
def model(request: pytest.FixtureRequest, denoisers: Any) -> Any:
    return denoisers[request.param]()


@pytest.fixture
def flux(denoisers: Any) -> Any:
    return denoisers["flux"]()


def joint_call(model: Any, image: Tensor, references: Tensor | None = None) -> Tensor:
    """A Flux transformer on five tokens of text, an image, and reference tokens behind it."""
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(H / 2), torch.arange(W / 2))
    if references is not None:
        image, places = torch.cat([image, references], 1), torch.cat([places, places + torch.tensor([1.0, 0, 0])])
    return model(
        image, encoder_hidden_states=random(2, 5, 16, seed=1, dtype=image.dtype), timestep=torch.full((2,), 0.5),
        pooled_projections=random(2, 16, seed=2, dtype=image.dtype), img_ids=places, txt_ids=torch.zeros(5, 3),
    ).sample  # fmt: skip


def test_tokens_of_reference_images_stay_and_are_no_words(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux Kontext has them behind the image: keys of the image alone are left out, in materialised attention too."""
    model = flux.double()
    image, references = (random(2, H * W // 4, 4, seed=seed, dtype=torch.float64) for seed in (0, 5))
    masks, sites = square(), attention_sites(model)
    tokens = TOKENS
    covered = torch.zeros(5 + 2 * tokens, dtype=torch.bool)
    covered[5 : 5 + tokens] = to_grid(masks, (H, W), sites[0]).flatten()
    weights = torch.zeros(2, 5, 1)
    weights[:, 3] = 1
    control = AttentionController(model, Layout((H, W), samples=2))
    control.drop_keys(masks.expand(2, -1, -1), sites, query_scale=0.3, scale_until=0.5)
    reader = AttentionController(model, Layout((H, W), samples=2))
    reader.capture(weights, sites)
    with control:
        found = joint_call(model, image, references)
    with reader:
        plain = joint_call(model, image, references)
    matrices: list[Tensor] = []

    def materialised(query: Tensor, key: Tensor, value: Tensor, drops: bool) -> Tensor:
        scale = torch.where(covered & drops, 0.3, 1.0).double()[:, None]
        logits = (query * scale) @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        matrix = logits.masked_fill(covered & drops, -torch.inf).softmax(-1)
        matrices.append(matrix)
        return matrix @ value

    for drops, wanted in ((True, found), (False, plain)):
        matrices.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.nn.functional, "scaled_dot_product_attention",
                lambda query, key, value, *_, drops=drops, **__: materialised(query, key, value, drops),
            )  # fmt: skip
            assert (joint_call(model, image, references) - wanted).abs().max() < 1e-10
    assert (found - plain).abs().max() > 1e-4
    for matrix, read in zip(matrices, reader.maps.values(), strict=True):
        column = matrix.mean(1)[:, 5 : 5 + tokens, 3].unflatten(1, (H // 2, W // 2))
        assert (read[:, 0] - column).abs().max() < 1e-6


def test_the_images_own_attention_is_read_from_joint_layers(model: Any, call: Any) -> None:
    """Softmax over image keys alone, of queries and keys as the layer has them behind norms and rotation."""
    sites = [site for site in attention_sites(model) if site.kind == "joint"]
    control = AttentionController(model, Layout((H, W), samples=2))
    control.capture_self(sites)
    pairs: list[tuple[Tensor, Tensor]] = []
    original = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, control:
        patch.setattr(
            torch.nn.functional, "scaled_dot_product_attention",
            lambda query, key, value, **kw: pairs.append((query, key)) or original(query, key, value, **kw),
        )  # fmt: skip
        call(model)
    maps, tokens = random(2, 3, H // 2, W // 2), H * W // 4
    joint = [pair for pair in pairs if pair[0].shape[2] == tokens + 5]
    image = slice(5, None) if sites[0].text == "first" else slice(tokens)
    flat = maps.flatten(2).transpose(1, 2).double()
    wanted = [
        (q[:, :, image].double() @ k[:, :, image].double().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        @ flat
        for q, k in joint
    ]
    found = control.spread(maps).flatten(2).transpose(1, 2)
    assert len(joint) == len(sites)
    assert (found - torch.stack(wanted).mean(0)).abs().max() < 1e-5


def test_words_that_a_call_does_not_have_are_refused(model: Any, call: Any) -> None:
    control = AttentionController(model, Layout((H, W), samples=2))
    control.capture(torch.ones(2, 6, 1), [site for site in attention_sites(model) if site.kind == "joint"])
    with control, pytest.raises(UnsupportedModelError, match=r"given 5 tokens of text, and the attention to 6"):
        call(model)


@pytest.mark.parametrize("kind", ["unet", "sd3", "flux"])
def test_another_size_than_was_said_is_refused(kind: str, denoisers: Any, call: Any) -> None:
    """More tokens behind those of Flux would be a reference image's; fewer are none."""
    model, side = denoisers[kind](), 2 * W if kind == "flux" else W // 2
    control = AttentionController(model, Layout((H, side), samples=2))
    sites = [site for site in attention_sites(model) if site.kind != "cross"]
    control.drop_keys(torch.ones(2, H, side).triu() > 0, sites)
    with control, pytest.raises(UnsupportedModelError, match=r"tokens, \d+ of them text's; wanted"):
        call(model)


def test_a_step_cache_is_refused(flux: Any, call: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    model = flux
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    control = AttentionController(model, Layout((H, W)))
    control.drop_keys(square(), attention_sites(model))
    with pytest.raises(UnsupportedModelError, match=r"disable_cache\(\) first"):
        control.__enter__()
    model.disable_cache()
    with control:
        call(model)


def test_a_layer_with_an_image_prompt_is_not_changed(flux: Any) -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = flux
    site = attention_sites(model)[0]
    processor = FluxIPAdapterAttnProcessor(16, 16)
    site.module.set_processor(processor)
    control = AttentionController(model, Layout((H, W)))
    control.drop_keys(square(), attention_sites(model))
    with pytest.raises(UnsupportedModelError, match="unload the IP-Adapter"):
        control.__enter__()
    assert site.module.processor is processor
