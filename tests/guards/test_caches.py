"""Step caches of diffusers never answer with what they computed before a switch of erasures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, MagCacheConfig, ModelHook, TaylorSeerCacheConfig
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.text_kv_cache import (
    TextKVCacheBlockHook,
    TextKVCacheBlockState,
    TextKVCacheState,
    TextKVCacheTransformerHook,
)

from erasure import ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.interop import hooks

from .made import hand_made

CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=1e9),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=100, spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",), current_timestep_callback=lambda: 500,
    ),
    "taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=100, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
    "magnitude": lambda: MagCacheConfig(
        threshold=1e9, max_skip_steps=100, retention_ratio=0.0, num_inference_steps=8, mag_ratios=[1.0] * 8
    ),
}  # fmt: skip
"""Each as greedy as it gets: after the passes that it needs it computes nothing anew."""
FILLING = 3


def passed(pipe: Any, x: torch.Tensor) -> torch.Tensor:
    """One pass of the denoiser for the prompt as it is encoded now."""
    backbone: Backbone = backbone_for(pipe, length=32)
    context = pipe.transformer.cache_context("cond") if pipe.transformer.is_cache_enabled else nullcontext()
    with torch.no_grad(), context:
        return backbone.predict(x, torch.tensor([500.0]), backbone.encode(["a photo of a cat"]))


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


SWITCHES: dict[str, Callable[[ErasureManager], None]] = {
    "scale": lambda manager: manager.set_erasures("cat", 0.5),
    "off": lambda manager: manager.disable(),
    "unload": lambda manager: manager.unload(),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_what_was_cached_is_forgotten_at_every_switch(originals: dict[str, Any], cache: str, component: str) -> None:
    plain, cached = (copy.deepcopy(originals["flux"]) for _ in range(2))
    made = hand_made(plain, component)
    cached.transformer.enable_cache(CACHES[cache]())
    for _ in range(FILLING):
        passed(cached, noise(0))
    assert not torch.allclose(passed(cached, noise(1)), passed(plain, noise(1)), atol=1e-4), "nothing is cached"
    one, two = ErasureManager(cached), ErasureManager(plain)
    attach: Callable[[ErasureManager], None] = lambda manager: manager.add(made, "cat")  # noqa: E731
    for name, switch in {"attach": attach, **SWITCHES}.items():
        for manager in (one, two):
            switch(manager)
        found, wanted = passed(cached, noise(1)), passed(plain, noise(1))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        for _ in range(FILLING):
            passed(cached, noise(0))
    assert cached.transformer.is_cache_enabled


@pytest.mark.parametrize("cache", CACHES)
def test_a_stock_twin_computes_every_pass_with_its_own_weights(originals: dict[str, Any], cache: str) -> None:
    """diffusers' hooks close over the network that they were put on, which a plain deep copy would run."""
    pipe = copy.deepcopy(originals["flux"])
    stock = passed(pipe, noise(1))
    pipe.transformer.enable_cache(CACHES[cache]())
    manager = ErasureManager(pipe)
    made = hand_made(pipe, "transformer")
    key = "transformer/transformer_blocks.0.attn.to_k"
    made.edits.low_rank[key] = next(iter(made.edits.low_rank.values()))
    manager.add(made, "cat", check_base=False)
    for _ in range(FILLING):
        passed(pipe, noise(0))
    twin = manager.stock()
    assert not twin.transformer.is_cache_enabled
    torch.testing.assert_close(passed(twin, noise(1)), stock, atol=1e-6, rtol=1e-5)
    assert pipe.transformer.is_cache_enabled


def test_a_stock_twin_runs_its_own_networks_under_hooks_of_others(originals: dict[str, Any]) -> None:
    """As layerwise casting and users put them on networks: what diffusers makes of a forward knows the original."""
    pipe = copy.deepcopy(originals["flux"])
    stock = passed(pipe, noise(1))
    made = hand_made(pipe, "transformer")
    made.edits.low_rank["transformer/transformer_blocks.0.attn.to_k"] = next(iter(made.edits.low_rank.values()))
    for part in (pipe.transformer, *pipe.transformer.transformer_blocks):
        for name in ("first", "second"):
            HookRegistry.check_if_exists_or_initialize(part).register_hook(ModelHook(), name)
    manager = ErasureManager(pipe)
    manager.add(made, "cat")
    erased = passed(pipe, noise(1))
    torch.testing.assert_close(passed(manager.stock(), noise(1)), stock, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(passed(manager.twin(), noise(1)), erased, atol=1e-6, rtol=1e-5)
    manager.unload()
    torch.testing.assert_close(passed(pipe, noise(1)), stock)


def test_keys_of_text_are_forgotten() -> None:
    """The real hooks of diffusers' text cache, on modules that stand in for the one transformer that knows it."""
    transformer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    block, shared, own = transformer[0], StateManager(TextKVCacheState), StateManager(TextKVCacheBlockState)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(TextKVCacheTransformerHook(shared), "text_kv_cache_transformer")
    HookRegistry.check_if_exists_or_initialize(block).register_hook(TextKVCacheBlockHook(shared, own), "text_kv_block")
    for manager in (shared, own):
        manager.set_context(CacheContext(name="inference"))
    shared.get_state().key = 7
    state = own.get_state()
    state.kv_cache[7] = (torch.ones(1), torch.ones(1))
    assert hooks.is_stateful(transformer)
    hooks.reset_caches(transformer)
    assert not state.kv_cache
    own.set_context(CacheContext(name="inference"))
    assert own.get_state() is not state
    hooks.remove_caches(transformer)
    assert not hooks.is_stateful(transformer)
    assert transformer(torch.ones(1, 2)).shape == (1, 2)
