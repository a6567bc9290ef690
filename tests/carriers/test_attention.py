"""Attention control against dense arithmetic in float64, on UNets and on the joint attention of SD3 and Flux."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.backbones import AttentionSite, attention_sites
from erasure.carriers import kernels
from erasure.carriers.attention import AttentionController, Layout, to_grid
from erasure.errors import NoMatchingModuleError, UnsupportedModelError

H, W = 12, 8


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention as it is written down, in float64: `(batch, tokens, heads, dim)`."""
    q, k, v = (part.double().transpose(1, 2) for part in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    return (logits.softmax(-1) @ v).transpose(1, 2)


def published(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attentive Eraser as its authors' code does it: two full softmaxes, blended by the query's mask."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, torch.finfo(q.dtype).min)
    foreground = (logits * scale + bias).softmax(-1) @ v
    background = (logits + bias).softmax(-1) @ v
    return torch.where(mask[:, None], foreground, background).transpose(1, 2)


@pytest.fixture(params=["unet", "sd3", "flux"])
def model(request: pytest.FixtureRequest, denoisers: Any) -> Any:
    return denoisers[request.param]()


@pytest.fixture
def unet(denoisers: Any) -> Any:
    return denoisers["unet"]()


def masks_of(samples: int) -> Tensor:
    mask = torch.zeros(samples, H, W, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    mask[1:, 6:10, 4:] = True
    return mask


def self_sites(model: Any) -> list[AttentionSite]:
    return [site for site in attention_sites(model) if site.kind != "cross"]


# Kernels ------------------------------------------------------------------------------------------------------------


def eraser(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same with keys left out."""
    factor = torch.ones_like(mask, dtype=q.dtype).masked_fill(mask, scale)
    return kernels.attend_without(q * factor[:, None, None], k, v, (~mask).nonzero()[:, 0])


def test_keys_left_out_equal_the_published_arithmetic() -> None:
    q, k, v = (random(2, H * W, 3, 8, seed=i) for i in range(3))
    mask = masks_of(1)[0].flatten()
    assert (eraser(q, k, v, mask, 0.3) - published(q, k, v, mask, 0.3)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_left_out_lose_less_in_half_precision_than_the_published_arithmetic(dtype: torch.dtype) -> None:
    mask = masks_of(1)[0].flatten()
    ours, theirs = [], []
    for seed in range(5):
        q, k, v = (2 * random(1, H * W, 3, 64, seed=10 * seed + i, dtype=dtype) for i in range(3))
        exact = published(q.double(), k.double(), v.double(), mask, 0.3)
        ours.append((eraser(q, k, v, mask, 0.3).double() - exact).pow(2).mean())
        theirs.append((published(q, k, v, mask, 0.3).double() - exact).pow(2).mean())
    assert sum(ours) < sum(theirs)


def test_weighted_keys_equal_a_bias_on_the_logits() -> None:
    q, k, v = (random(2, 40, 3, 8, seed=i) for i in range(3))
    bias = random(2, 40, seed=4)
    assert (kernels.attend_weighted(q, k, v, bias) - dense(q, k, v, bias[:, None, None])).abs().max() < 1e-5


def test_weighted_keys_are_refused_where_keys_are_quantised() -> None:
    q = random(1, 4, 1, 8)
    with pytest.raises(UnsupportedModelError, match="sage"):
        kernels.attend_weighted(q, q, q, torch.zeros(1, 4), "sage")


@pytest.mark.parametrize("maps", [1, 3, 20])
def test_attention_mass_is_the_weighted_sum_of_columns(maps: int) -> None:
    q, k = random(2, 40, 3, 8, seed=0), random(2, 24, 3, 8, seed=1)
    weights = random(2, 24, maps, seed=2)
    wanted = dense(q, k, weights[:, :, None].expand(-1, -1, 3, -1)).mean(2)
    assert (kernels.attention_mass(q, k, weights) - wanted).abs().max() < 1e-5


def test_attention_mass_has_exact_gradients() -> None:
    q, k = (random(1, n, 2, 4, seed=n, dtype=torch.float64).requires_grad_(True) for n in (6, 5))
    weights = torch.eye(5, dtype=torch.float64)[None, :, 1:3]
    assert torch.autograd.gradcheck(lambda a, b: kernels.attention_mass(a, b, weights), (q, k))


# Layers -------------------------------------------------------------------------------------------------------------


def test_every_site_is_found_with_its_grid(model: Any, call: Any) -> None:
    sites = attention_sites(model)
    tokens: dict[str, int] = {}
    for site in sites:
        kept = site.module.processor

        def watch(attn: Any, hidden_states: Tensor, *args: Any, _kept: Any = kept, _name: str = site.name, **kw: Any):  # type: ignore[no-untyped-def]
            tokens[_name] = hidden_states.shape[1]
            return _kept(attn, hidden_states, *args, **{k: v for k, v in kw.items() if v is not None})

        site.module.processor = watch
    call(model)
    for site in sites:
        rows, columns = site.grid(H, W)
        inside = 5 if "single" in site.name else 0
        assert tokens[site.name] == rows * columns + inside


def test_a_mask_touches_every_token_that_it_overlaps(unet: Any) -> None:
    site = next(site for site in attention_sites(unet) if site.downsampling == 2)
    mask = torch.zeros(1, 7, 5, dtype=torch.bool)
    mask[0, 6, 4] = True
    assert to_grid(mask, (7, 5), site).nonzero().tolist() == [[0, 3, 2]]
    fine = torch.zeros(1, 56, 40, dtype=torch.bool)
    fine[0, 55, 0] = True
    assert to_grid(fine, (7, 5), site).nonzero().tolist() == [[0, 3, 0]]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("log_weight", [None, -1.5])
def test_edited_layers_equal_dense_attention(
    model: Any, samples: int, log_weight: float | None, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    """Two branches of which the second is changed, with one mask for all or one each, in the model as a whole."""
    model = model.double()
    masks, sites = masks_of(samples), self_sites(model)
    control = AttentionController(model, Layout((H, W), samples=samples, branches=2, changed=(1,)))
    if log_weight is None:
        control.drop_keys(masks, sites, query_scale=0.3, scale_until=0.5)
    else:
        control.weight_keys(masks, log_weight, sites, query_scale=0.3, scale_until=0.5)
    inside: list[AttentionSite] = []
    plain = call(model, batch=4)
    with control:
        found = call(model, batch=4)
    assert torch.equal(call(model, batch=4), plain)

    def dense_sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        site = inside[-1]
        covered = torch.zeros(4, key.shape[2], dtype=torch.bool)
        if site.kind != "cross":
            mask = to_grid(masks, (H, W), site).flatten(1).repeat(2 // samples, 1)
            text = key.shape[2] - mask.shape[1]
            covered[2:, slice(text, None) if site.text == "first" else slice(mask.shape[1])] = mask
        weight = torch.finfo(query.dtype).min if log_weight is None else log_weight
        bias = torch.zeros(covered.shape).double().masked_fill(covered, weight)[:, None, None]
        scale = torch.ones(covered.shape).double().masked_fill(covered, 0.3)[:, None, :, None]
        if site.kind == "cross":
            scale = scale[:, :, :1]
        return dense(*(part.transpose(1, 2) for part in (query * scale, key, value)), bias).transpose(1, 2)

    for site in attention_sites(model):
        site.module.register_forward_pre_hook(lambda *_, s=site: inside.append(s))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", dense_sdpa)
    wanted = call(model, batch=4)
    assert (found - plain)[2:].abs().max() > 1e-4
    assert (found - plain)[:2].abs().max() < 1e-6
    assert (found - wanted).abs().max() < 1e-6


def test_captured_columns_equal_the_dense_matrix(model: Any, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    sites = [site for site in attention_sites(model) if site.kind != "self"]
    weights = torch.zeros(2, 5, 2)
    weights[:, 2, 0] = 1
    weights[:, 3:, 1] = 0.5
    control = AttentionController(model, Layout((H, W), samples=2))
    control.capture(weights, sites)
    plain = call(model)
    with control:
        assert torch.equal(call(model), plain)
    inside: list[AttentionSite] = []
    wanted: dict[str, Tensor] = {}
    original = torch.nn.functional.scaled_dot_product_attention

    def watch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        site = inside[-1]
        rows, columns = site.grid(H, W)
        if site.kind != "self":
            matrix = (query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1).mean(1)
            image = slice(5, None) if site.text == "first" else slice(0, rows * columns)
            text = slice(rows * columns, None) if site.text == "last" else slice(0, 5)
            picked = matrix[:, image][:, :, text] @ weights.double()
            wanted[site.name] = picked.transpose(1, 2).unflatten(2, (rows, columns))
        return original(query, key, value, *args, **kwargs)

    for site in attention_sites(model):
        site.module.register_forward_pre_hook(lambda *_, s=site: inside.append(s))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    call(model)
    assert control.maps.keys() == wanted.keys() == {site.name for site in sites}
    for name, found in control.maps.items():
        assert (found - wanted[name]).abs().max() < 1e-5


def test_collecting_stops_at_the_last_captured_layer_with_the_same_gradient(unet: Any) -> None:
    sites = [site for site in attention_sites(unet) if site.kind == "cross" and site.downsampling == 2]
    text, weights = random(1, 5, 16), torch.eye(5)[None]
    ran: list[str] = []
    unet.up_blocks[1].register_forward_pre_hook(lambda *_: ran.append("last block"))

    def gradient(early: bool) -> Tensor:
        control = AttentionController(unet, Layout((H, W)))
        # The last layer is the last that runs, in whatever order they were named.
        control.capture(weights, sites[::-1])
        latents = random(1, 4, H, W).requires_grad_(True)
        forward = lambda: unet(latents, torch.tensor(500), encoder_hidden_states=text)  # noqa: E731
        with control:
            control.collect(forward) if early else forward()
        loss = sum(found.pow(2).sum() for found in control.maps.values())
        return torch.autograd.grad(loss, latents)[0]

    early = gradient(True)
    assert not ran
    late = gradient(False)
    assert ran
    assert (early - late).abs().max() <= 1e-5 * late.abs().max()


def test_self_attention_is_applied_to_maps(call: Any, unet: Any) -> None:
    sites = [site for site in self_sites(unet) if site.downsampling == 1]
    control = AttentionController(unet, Layout((H, W), samples=2))
    control.capture_self(sites)
    with control:
        call(unet)
    maps = random(2, 3, H, W)
    flat = maps.flatten(2).transpose(1, 2)
    pairs = [capture.pair for _, capture in control._captures.values() if capture.pair is not None]
    wanted = torch.stack([dense(q, k, flat[:, :, None].expand(-1, -1, q.shape[2], -1)).mean(2) for q, k in pairs])
    assert (control.spread(maps).flatten(2).transpose(1, 2) - wanted.mean(0)).abs().max() < 1e-5


# What was there -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_processors_come_back_whatever_happens(model: Any, failure: type[BaseException], call: Any) -> None:
    before = {site.name: site.module.processor for site in attention_sites(model)}
    plain = call(model)
    control = AttentionController(model, Layout((H, W)))
    control.drop_keys(masks_of(1), self_sites(model))
    control.capture(torch.ones(1, 5, 1), [site for site in attention_sites(model) if site.kind != "self"][:1])

    def fail() -> None:
        with control:
            assert (call(model) - plain).abs().max() > 1e-5
            raise failure

    with pytest.raises(failure):
        fail()
    assert all(site.module.processor is before[site.name] for site in attention_sites(model))
    assert torch.equal(call(model), plain)


def test_a_mask_of_nothing_or_everything_leaves_layers_alone(model: Any, call: Any) -> None:
    plain = call(model)
    for mask in (torch.zeros(1, H, W, dtype=torch.bool), torch.ones(1, H, W, dtype=torch.bool)):
        control = AttentionController(model, Layout((H, W)))
        control.drop_keys(mask, self_sites(model))
        with control:
            assert (call(model) - plain).abs().max() < 1e-5


def test_fused_projections_and_lora_count(call: Any, unet: Any) -> None:
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    found = []
    for fuse in (False, True):
        if fuse:
            unet.fuse_lora()
            unet.unload_lora()
            unet.fuse_qkv_projections()
        control = AttentionController(unet, Layout((H, W)))
        control.drop_keys(masks_of(1), self_sites(unet))
        with control:
            found.append(call(unet))
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_the_steps_decide_what_is_scaled_and_when_keys_come_back(call: Any, unet: Any) -> None:
    plain = call(unet)
    control = AttentionController(unet, Layout((H, W)))
    control.drop_keys(masks_of(1), self_sites(unet), query_scale=0.3, scale_until=0.25, until=0.75)
    seen = []
    with control:
        for share in (0.0, 0.2, 0.25, 0.74, 0.75, 1.0):
            control.at(share)
            seen.append(call(unet))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.allclose(seen[1], seen[2])
    assert (seen[4] - plain).abs().max() < 1e-5
    assert torch.equal(seen[4], seen[5])


def test_what_cannot_be_controlled_is_refused(call: Any, unet: Any) -> None:
    control = AttentionController(unet, Layout((H, W), samples=2, branches=2))
    cross = [site for site in attention_sites(unet) if site.kind == "cross"]
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        control.drop_keys(masks_of(2), cross)
    with pytest.raises(NoMatchingModuleError, match="no attention layer"):
        control.capture(torch.ones(1, 5, 1), [])
    control.drop_keys(masks_of(2), self_sites(unet))
    with control, pytest.raises(UnsupportedModelError, match="3 rows"):
        call(unet, batch=3)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        attention_sites(torch.nn.Linear(1, 1))


def test_on_a_grid_that_a_mask_covers_the_freest_tokens_stay(tiny_pipe: Any) -> None:
    """A mask that touches every token of a coarse grid: attention goes to those that it covers least."""
    site = AttentionSite("attn1", torch.nn.Identity(), "self", 4)
    mask = torch.ones(2, 16, 16, dtype=torch.bool)
    mask[0, :3, :4] = False  # three quarters of the first token, and a quarter of the second
    mask[0, 0, 4:8] = False
    mask[1, 0, 0] = False
    grid = to_grid(mask, (16, 16), site)
    assert (~grid).nonzero().tolist() == [[0, 0, 0], [1, 0, 0]]
    everything = torch.ones(1, 16, 16, dtype=torch.bool)
    assert to_grid(everything, (16, 16), site).all()
    ragged = torch.ones(1, 7, 5, dtype=torch.bool)
    ragged[0, 6, 4] = False
    assert (~to_grid(ragged, (7, 5), site)).nonzero().tolist() == [[0, 1, 1]]
